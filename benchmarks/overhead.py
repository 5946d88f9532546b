"""Cost of the orchestrator (`make bench-overhead`).

1. K experts through the runner on Ray, against the same K trainings by hand: `python -m experts`, one process per
   expert, as many at once as there are cores. Both sides read the same shards and write byte-identical experts.
2. A training step of `fit`, against a bare PyTorch loop with the same model, data and mathematics.

The two sides alternate. The start-up time of Ray is reported separately.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.record import Claim, Listing, median_and_range, write_result
from ddm_core.artifacts import Workspace, to_jsonable, write_json
from experts.codecs.registry import load_codec
from experts.config import ExpertConfig, TrainingConfig
from experts.diffusion.noise_schedule import NOISE_SCHEDULES
from experts.networks.registry import build_network
from experts.training.latent_dataset import LatentDataset, make_batch
from experts.training.latents.training_set import encode_latents
from experts.training.loss import expert_loss
from experts.training.optimizers.ema import MovingAverage
from experts.training.optimizers.lr_schedules import learning_rate
from experts.training.trainer import fit
from orchestrator.backends.inline import InlineBackend
from orchestrator.config.compute import ComputeConfig
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import Stage
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.runner import Runner


@dataclass(frozen=True, slots=True, kw_only=True)
class Repetition:
    """One measurement of both sides."""

    ddm_s: float
    """From the first submission to the last finished expert."""
    ray_start_s: float
    by_hand_s: float
    is_identical: bool
    """Both sides wrote byte-identical experts."""


def main() -> None:
    """Measure both costs, write docs/benchmarks/overhead.json and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=3300, help="steps of every expert; one side takes about two minutes"
    )
    parser.add_argument("--turns", dest="repetitions", type=int, default=3, help="repetitions of both sides")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(Path(folder) / "prepared", options.steps)
        prepared = prepare_run(config)
        repetitions = [
            measure_repetition(prepared, config, Path(folder) / f"repetition_{number}")
            for number in range(options.repetitions)
        ]
        ratios = measure_step_ratios(prepared, config, Path(folder) / "steps")
    report(repetitions, ratios, time.monotonic() - started)


def make_config(folder: Path, steps: int) -> RunConfig:
    """Return the demo's configuration with longer training and without a monolith."""
    overrides = [f"folder={folder}", f"expert.training.steps={steps}", "monolith=false", "wandb.mode=disabled"]
    return parse_config(compose(["experiment=demo", *overrides]))


def stages_up_to_experts(config: RunConfig) -> list[Stage]:
    """Return the experts' stages and all stages before them."""
    kinds = ("dataset", "codec", "latents", "features", "partition", "expert")
    return [stage for stage in build_graph(config) if stage.kind in kinds]


def prepare_run(config: RunConfig) -> RunFolder:
    """Run all stages before the experts; their time is not measured."""
    run = RunFolder(Path(config.folder))
    run.root.mkdir(parents=True)
    stages = [stage for stage in stages_up_to_experts(config) if stage.kind != "expert"]
    Runner(run=run, graph=stages, backend=InlineBackend(), policy=config.compute).run_to_end()
    return run


def measure_repetition(prepared: RunFolder, config: RunConfig, folder: Path) -> Repetition:
    """Measure both sides once, one after the other."""
    graph = stages_up_to_experts(config)
    experts = [stage for stage in graph if stage.kind == "expert"]
    run = RunFolder(Path(shutil.copytree(prepared.root, folder / "ddm")))
    ray_start_s, ddm_s = time_ddm(run, graph, config.compute)
    by_hand_s = time_by_hand(prepared, experts, folder / "hand")
    is_identical = all(
        (run.artifact(stage) / name).read_bytes() == (folder / "hand" / stage.name / name).read_bytes()
        for stage in experts
        for name in ("diffusion_pytorch_model.safetensors", "metrics.jsonl")
    )
    return Repetition(ddm_s=ddm_s, ray_start_s=ray_start_s, by_hand_s=by_hand_s, is_identical=is_identical)


def time_ddm(run: RunFolder, graph: list[Stage], policy: ComputeConfig) -> tuple[float, float]:
    """Return the start-up seconds of Ray, and the seconds from first submission to last finished expert."""
    from orchestrator.backends.ray_tasks import RayBackend

    started = time.monotonic()
    backend = RayBackend(policy)
    ready = time.monotonic()
    try:
        result = Runner(run=run, graph=graph, backend=backend, policy=policy).run_to_end()
        ended = time.monotonic()
    finally:
        backend.close()
    if result.failed:
        raise RuntimeError(f"all experts must finish for a comparison; failed: {result.failed}; read their logs")
    return ready - started, ended - ready


def time_by_hand(prepared: RunFolder, experts: list[Stage], folder: Path) -> float:
    """Return the seconds of the same trainings, one process each, as many at once as there are cores."""
    folder.mkdir(parents=True)
    started = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda stage: _train_by_hand(prepared, stage, folder), experts))
    return time.monotonic() - started


def _train_by_hand(prepared: RunFolder, stage: Stage, folder: Path) -> None:
    config_file = folder / f"{stage.name}.json"
    write_json(config_file, to_jsonable(stage.config.expert))
    inputs = {role: str(prepared.input_folder(source)) for role, source in stage.inputs.items()}
    command = [sys.executable, "-m", "experts", "--shards", inputs["latents"], "--codec", inputs["codec"]]
    command += ["--held-out", inputs["holdout"]]
    command += [
        "--config",
        str(config_file),
        "--out",
        str(folder / stage.name),
        "--cluster-id",
        str(stage.config.cluster_id),
    ]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def measure_step_ratios(
    prepared: RunFolder, config: RunConfig, scratch: Path, blocks: int = 9, steps: int = 400
) -> list[float]:
    """Return the CPU time of `fit` over that of a bare loop, in alternating blocks on one thread."""
    torch.set_num_threads(1)
    stage = next(stage for stage in stages_up_to_experts(config) if stage.kind == "expert")
    latents, codec = (prepared.input_folder(stage.inputs[role]) for role in ("latents", "codec"))
    dataset = encode_latents([latents], load_codec(codec), codec, Workspace.at(scratch / "data"))
    expert: ExpertConfig = stage.config.expert
    training = replace(expert.training, steps=steps)
    ratios = []
    for block in range(blocks):
        sides: dict[str, Callable[[], None]] = {
            "fit": lambda block=block: run_fit(expert, training, dataset, scratch / str(block)),
            "bare": lambda: run_bare(expert, training, dataset),
        }
        order = ("fit", "bare") if block % 2 else ("bare", "fit")
        seconds = {name: cpu_seconds(sides[name]) for name in order}
        ratios.append(seconds["fit"] / seconds["bare"])
    return ratios[1:]  # the first block warms up


def cpu_seconds(function: Callable[[], None]) -> float:
    """Return the CPU time of one call, summed over all threads of this process."""
    started = time.process_time()
    function()
    return time.process_time() - started


def run_fit(expert: ExpertConfig, training: TrainingConfig, dataset: LatentDataset, scratch: Path) -> None:
    """Train with the project's loop, including metrics, progress and checkpoints."""
    noise_schedule = NOISE_SCHEDULES[expert.noise_schedule]
    model = build_network(expert.network, dataset.latent_shape, 10)
    fit(
        model,
        lambda network, batch: {"loss": expert_loss(network, batch, expert.prediction, noise_schedule)},
        dataset,
        training,
        Workspace.at(scratch),
    )


def run_bare(expert: ExpertConfig, training: TrainingConfig, dataset: LatentDataset) -> None:
    """Train with the same mathematics in a plain loop."""
    noise_schedule = NOISE_SCHEDULES[expert.noise_schedule]
    model = build_network(expert.network, dataset.latent_shape, 10).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, weight_decay=0.0, fused=True)
    moving_average = MovingAverage(model, training.ema_width)
    for step in range(training.steps):
        batch = make_batch(dataset, training, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, training)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(expert_loss(model, batch, expert.prediction, noise_schedule))
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
        optimizer.step()
        moving_average.update(step + 1)


def report(repetitions: list[Repetition], step_ratios: list[float], seconds: float) -> None:
    """Write the result and print it."""
    wall, wall_range = median_and_range([repetition.ddm_s / repetition.by_hand_s for repetition in repetitions])
    step, step_range = median_and_range(step_ratios)
    is_identical = all(repetition.is_identical for repetition in repetitions)
    claims = [
        Claim(
            name="wall-clock time of K experts through `ddm`, over one process per expert by hand",
            bar="≤ 1.05",
            value=wall,
            spread=wall_range,
            holds=float(wall) <= 1.05,
        ),
        Claim(
            name="CPU time of a training step, over a bare PyTorch loop",
            bar="≤ 1.02",
            value=step,
            spread=step_range,
            holds=float(step) <= 1.02,
        ),
        Claim(
            name="both sides write byte-identical experts",
            bar="all",
            value="all" if is_identical else "not all",
            spread=f"n = {len(repetitions)}",
            holds=is_identical,
        ),
    ]
    rows = [
        (
            str(number),
            f"{repetition.ddm_s:.1f}",
            f"{repetition.by_hand_s:.1f}",
            f"{repetition.ddm_s / repetition.by_hand_s:.3f}",
            f"{repetition.ray_start_s:.1f}",
        )
        for number, repetition in enumerate(repetitions, start=1)
    ]
    listing = Listing(
        title="All repetitions, in seconds",
        columns=("repetition", "ddm", "by hand", "ratio", "start-up of Ray (separate)"),
        rows=rows,
    )
    notes = [
        "The start-up of Ray is that of its head processes (GCS, raylet, agents). Workers import torch and diffusers "
        "within the measured time, as do the processes started by hand. Ray reuses its workers for the next expert; "
        "processes started by hand are not reused."
    ]
    print(json.dumps(to_jsonable(write_result("overhead", seconds, claims, [listing], notes)), indent=1))


if __name__ == "__main__":
    main()
