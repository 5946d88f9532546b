"""What the orchestrator costs (`make bench-overhead`).

1. K experts through the runner on Ray, against the same K trainings by hand: `python -m experts`, one process per
   expert, as many at once as there are cores. Both sides train from the same shards to the same bytes.
2. A training step of `fit`, against a bare PyTorch loop over the same model, data and mathematics.

Sides take turns. The start-up of Ray is reported apart.
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
from experts.training.ema import MovingAverage
from experts.training.latent_dataset import LatentDataset, encode_latents, make_batch
from experts.training.loss import expert_loss
from experts.training.trainer import fit, learning_rate
from orchestrator.backends.inline import InlineBackend
from orchestrator.config.compute import ComputeConfig
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import Stage
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.runner import Runner


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One pass of both sides."""

    ddm_s: float
    """First submission to last finished expert."""
    ray_start_s: float
    hand_s: float
    same_bytes: bool


def main() -> None:
    """Measure both, write docs/benchmarks/overhead.json and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3300, help="steps of every expert; a side takes about two minutes")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(Path(folder) / "prepared", options.steps)
        prepared = prepare(config)
        turns = [take_turn(prepared, config, Path(folder) / f"turn_{number}") for number in range(options.turns)]
        blocks = step_ratios(prepared, config, Path(folder) / "steps")
    report(turns, blocks, time.monotonic() - started)


def configuration(folder: Path, steps: int) -> RunConfig:
    """The demo with longer training and without whatever is not an expert."""
    overrides = [f"folder={folder}", f"expert.training.steps={steps}", "monolith=false", "wandb.mode=disabled"]
    return parse_config(compose(["experiment=demo", *overrides]))


def experts_and_before(config: RunConfig) -> list[Stage]:
    """The part of the graph that ends with the experts."""
    kinds = ("dataset", "codec", "features", "partition", "expert")
    return [stage for stage in build_graph(config) if stage.kind in kinds]


def prepare(config: RunConfig) -> RunFolder:
    """Everything that the experts read, finished before the clock starts."""
    run = RunFolder(Path(config.folder))
    run.root.mkdir(parents=True)
    before = [stage for stage in experts_and_before(config) if stage.kind != "expert"]
    Runner(run=run, graph=before, backend=InlineBackend(), policy=config.compute).run_to_end()
    return run


def take_turn(prepared: RunFolder, config: RunConfig, folder: Path) -> Turn:
    """Both sides once, one after the other."""
    graph = experts_and_before(config)
    experts = [stage for stage in graph if stage.kind == "expert"]
    ours = RunFolder(Path(shutil.copytree(prepared.root, folder / "ddm")))
    ray_start_s, ddm_s = by_ddm(ours, graph, config.compute)
    hand_s = by_hand(prepared, experts, folder / "hand")
    same = all(
        (ours.artifact(stage) / name).read_bytes() == (folder / "hand" / stage.name / name).read_bytes()
        for stage in experts
        for name in ("diffusion_pytorch_model.safetensors", "metrics.jsonl")
    )
    return Turn(ddm_s=ddm_s, ray_start_s=ray_start_s, hand_s=hand_s, same_bytes=same)


def by_ddm(run: RunFolder, graph: list[Stage], policy: ComputeConfig) -> tuple[float, float]:
    """Seconds that Ray took to start, and seconds from the first submission to the last finished expert."""
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
        raise RuntimeError(f"experts failed, so there is nothing to compare: {result.failed}")
    return ready - started, ended - ready


def by_hand(prepared: RunFolder, experts: list[Stage], folder: Path) -> float:
    """Seconds for the same trainings, each in a process of its own, as many at once as there are cores."""
    folder.mkdir(parents=True)
    started = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda stage: _train_by_hand(prepared, stage, folder), experts))
    return time.monotonic() - started


def _train_by_hand(prepared: RunFolder, stage: Stage, folder: Path) -> None:
    recipe = folder / f"{stage.name}.json"
    write_json(recipe, to_jsonable(stage.config.expert))
    inputs = {role: str(prepared.input(given)) for role, given in stage.inputs.items()}
    command = [sys.executable, "-m", "experts", "--shards", inputs["shards"], "--codec", inputs["codec"]]
    command += [
        "--config",
        str(recipe),
        "--out",
        str(folder / stage.name),
        "--cluster-id",
        str(stage.config.cluster_id),
    ]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def step_ratios(
    prepared: RunFolder, config: RunConfig, scratch: Path, blocks: int = 9, steps: int = 400
) -> list[float]:
    """CPU time of `fit` over that of a bare loop, block by block in turns, one thread."""
    torch.set_num_threads(1)
    stage = next(stage for stage in experts_and_before(config) if stage.kind == "expert")
    shards, codec = prepared.input(stage.inputs["shards"]), prepared.input(stage.inputs["codec"])
    dataset = encode_latents([shards], load_codec(codec), codec, Workspace.at(scratch / "data"))
    recipe: ExpertConfig = stage.config.expert
    training = replace(recipe.training, steps=steps)
    ratios = []
    for block in range(blocks):
        sides: dict[str, Callable[[], None]] = {
            "fit": lambda block=block: run_fit(recipe, training, dataset, scratch / str(block)),
            "bare": lambda: run_bare(recipe, training, dataset),
        }
        order = ("fit", "bare") if block % 2 else ("bare", "fit")
        took = {name: cpu_seconds(sides[name]) for name in order}
        ratios.append(took["fit"] / took["bare"])
    return ratios[1:]  # the first block warms up


def cpu_seconds(work: Callable[[], None]) -> float:
    """CPU time of one call, all threads of this process together."""
    started = time.process_time()
    work()
    return time.process_time() - started


def run_fit(recipe: ExpertConfig, training: TrainingConfig, dataset: LatentDataset, scratch: Path) -> None:
    """The project's own loop, with its metrics, progress and checkpoints."""
    path = NOISE_SCHEDULES[recipe.noise_schedule]
    model = build_network(recipe.network, dataset.latent_shape, 10)
    fit(
        model,
        lambda network, batch: {"loss": expert_loss(network, batch, recipe.prediction, path)},
        dataset,
        training,
        Workspace.at(scratch),
    )


def run_bare(recipe: ExpertConfig, training: TrainingConfig, dataset: LatentDataset) -> None:
    """The same mathematics with nothing around it."""
    path = NOISE_SCHEDULES[recipe.noise_schedule]
    model = build_network(recipe.network, dataset.latent_shape, 10).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.lr, weight_decay=0.0, fused=True)
    average = MovingAverage(model, training.ema_width)
    for step in range(training.steps):
        batch = make_batch(dataset, training, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, training)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(expert_loss(model, batch, recipe.prediction, path))
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
        optimizer.step()
        average.update(step + 1)


def report(turns: list[Turn], blocks: list[float], seconds: float) -> None:
    """Write the result and print it."""
    wall, wall_range = median_and_range([turn.ddm_s / turn.hand_s for turn in turns])
    step, step_range = median_and_range(blocks)
    claims = [
        Claim(
            name="wall clock of K experts through `ddm`, over one process per expert by hand",
            bar="<= 1.05",
            value=wall,
            spread=wall_range,
            holds=float(wall) <= 1.05,
        ),
        Claim(
            name="CPU time of a training step, over a bare PyTorch loop",
            bar="<= 1.02",
            value=step,
            spread=step_range,
            holds=float(step) <= 1.02,
        ),
        Claim(
            name="both sides write the same bytes",
            bar="all",
            value="all" if all(turn.same_bytes for turn in turns) else "not all",
            spread=f"n = {len(turns)}",
            holds=all(turn.same_bytes for turn in turns),
        ),
    ]
    rows = [
        (
            str(number),
            f"{turn.ddm_s:.1f}",
            f"{turn.hand_s:.1f}",
            f"{turn.ddm_s / turn.hand_s:.3f}",
            f"{turn.ray_start_s:.1f}",
        )
        for number, turn in enumerate(turns, start=1)
    ]
    listing = Listing(
        title="Every turn, in seconds",
        columns=("turn", "ddm", "by hand", "ratio", "start of Ray (apart)"),
        rows=rows,
    )
    notes = [
        "The start of Ray is that of its head processes (GCS, raylet, agents). Workers import torch and diffusers "
        "inside the measured time, as the processes started by hand do; they are used again for the next expert, "
        "those are not."
    ]
    print(json.dumps(to_jsonable(write_result("overhead", seconds, claims, [listing], notes)), indent=1))


if __name__ == "__main__":
    main()
