"""Are all backbones usable as experts, and are their sizes in `ddm plan` right? (`make bench-backbones`)

Sizes are counted on the meta device in a process of their own. Trainings that fit this machine are run in one each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import Claim, Listing, write_result
from benchmarks.testbed.backbones import (
    PUBLISHED,
    TINY,
    UNUSED,
    adapter_of,
    build,
    gradients,
    inputs,
    text,
)
from benchmarks.testbed.peak_memory import watching_memory
from ddm_core.artifacts import Workspace, to_jsonable
from experts.conditions.condition import Condition
from experts.conditions.text_embedding import TextEmbedding
from experts.config import DiffusersConfig, ExpertConfig, TrainingConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.networks.adapters.adapter import DataShape
from experts.networks.class_settings import NetworkError
from experts.networks.model_io import save_model
from experts.networks.registry import build_network, call_network, enable_gradient_checkpointing, load_network
from experts.training.flops import forward_flops
from experts.training.latent_dataset import LatentDataset
from experts.training.loss import expert_loss
from experts.training.trainer import fit
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import parse_config
from orchestrator.planning.network_sizes import measure_expert

ROW_TOLERANCE = 5e-6
GIGA = 1e9
FLUX: dict[str, Any] = {"num_layers": 1, "num_single_layers": 4, "num_attention_heads": 4, "attention_head_dim": 128}
PRX: dict[str, Any] = {"hidden_size": 384, "num_heads": 6, "depth": 6, "axes_dim": [32, 32]}
SMALL_TEXT = (16, 384, 384)
MEASURED: dict[str, tuple[DiffusersConfig | None, DataShape, int]] = {
    "dit_b_2": (None, DataShape(latent_shape=(4, 8, 8), num_classes=1000), 4),
    "pixart_small": (None, DataShape(latent_shape=(8, 16, 16), text_shape=SMALL_TEXT), 32),
    "sd3_small": (None, DataShape(latent_shape=(8, 16, 16), text_shape=SMALL_TEXT), 32),
    "unet_text_small": (None, DataShape(latent_shape=(8, 16, 16), text_shape=SMALL_TEXT), 16),
    "Flux, 5 blocks": (
        DiffusersConfig(class_name="FluxTransformer2DModel", settings=FLUX),
        DataShape(latent_shape=(16, 16, 16), text_shape=(32, 768, 768)),
        8,
    ),
    "PRX, 6 blocks": (
        DiffusersConfig(class_name="PRXTransformer2DModel", settings=PRX),
        DataShape(latent_shape=(16, 16, 16), text_shape=(32, 768, 768)),
        8,
    ),
}
"""A configuration (None: that of the name), data and batch of the trainings that are run here."""


def main() -> None:
    """Measure everything, write docs/benchmarks/backbones.json and print its claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("sizes", "train"), help="run one part in this process, and print JSON")
    parser.add_argument("--name", help="the training of --part train")
    options = parser.parse_args()
    if options.part is not None:
        sys.stdout.write(json.dumps(count_sizes() if options.part == "sizes" else run_training(options.name)))
        return
    started = time.monotonic()
    laws = {case: check_laws(case) for case in TINY}
    sizes = run_part("sizes")
    trainings = {name: run_part("train", name) for name in MEASURED}
    result = write_result(
        "backbones",
        time.monotonic() - started,
        [*law_claims(laws), *size_claims(sizes, trainings)],
        [law_listing(laws), size_listing(sizes), training_listing(trainings)],
        [
            "Sizes of published networks are at latents of 32 x 32. FLOPs are of one row forward. The measured memory "
            "is the largest anonymous memory of the process in three training steps, less that before the network was "
            "built. It returns freed memory to the system (MALLOC_MMAP_THRESHOLD_=65536); glibc's default keeps more: "
            "1.3 x as much for pixart_small.",
            "The parameters are compared with counts of the published networks, CogView4 with the 6 billion of its "
            "release; the class's defaults give 2,849 million.",
        ],
    )
    print(json.dumps(to_jsonable(result["claims"]), indent=1))


def run_part(part: str, name: str = "") -> Any:
    """Run a part in a process of its own, and return what it prints."""
    command = [sys.executable, "-m", "benchmarks.backbones", "--part", part, *(["--name", name] if name else [])]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    print(f"{part} {name} done", file=sys.stderr, flush=True)
    return json.loads(output.splitlines()[-1])


Laws = dict[str, Any]
"""Results of the laws of one class: True, or what failed."""


def check_laws(case: str) -> Laws:
    """Return the results of a tiny network."""
    torch.set_num_threads(1)
    model, (noised, t, condition) = build(case), inputs(case)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save_model(model, Path(folder))
        loaded = load_network(Path(folder))
        together = call_network(model, noised, t, condition)
        is_equal = torch.equal(call_network(loaded, noised, t, condition), together)
        is_equal &= all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
        rows = [torch.tensor([row]) for row in range(len(noised))]
        alone = torch.cat([call_network(model, noised[row], t[row], condition.rows(row)) for row in rows])
    unused = {name for name, gradient in gradients(build(case), case).items() if gradient is None}
    return {
        "trains": unused == UNUSED.get(case, set()),
        "loads equal": is_equal,
        "row alone": float((alone - together).abs().max()),
        "refuses lengths": refuses_another_length(case),
        "checkpointing": compare_checkpointing(case),
    }


def refuses_another_length(case: str) -> bool:
    """Return whether a text of another length is an error."""
    noised, t, condition = inputs(case)
    try:
        call_network(build(case), noised, t, Condition(condition.class_id, text(3, tokens=9)))
    except ValueError:
        return True
    return False


def compare_checkpointing(case: str) -> str:
    """Return `equal`, `refused` or `different`."""
    checkpointed = build(case)
    try:
        enable_gradient_checkpointing(checkpointed)
    except NetworkError as error:
        return "refused" if adapter_of(case).class_name in str(error) else "different"
    plain, actual = gradients(build(case), case), gradients(checkpointed, case)
    unlike = [name for name, gradient in plain.items() if not is_same(gradient, actual[name])]
    return "different" if unlike else "equal"


def is_same(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    """Return whether two gradients are equal bit for bit, or both missing."""
    return first is second or (first is not None and second is not None and torch.equal(first, second))


def count_sizes() -> dict[str, Any]:
    """Count every published size; return them, and the memory of this process."""
    sizes = {}
    for name, published in PUBLISHED.items():
        network = expert_config(name).network
        training = TrainingConfig(batch_size=1, steps=1, warmup_steps=0)
        size = measure_expert(ExpertConfig(network=network, training=training), published.data())
        sizes[name] = {"parameters": size.parameters, "flops": size.flops / 3, "bytes": size.memory_bytes}
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"sizes": sizes, "peak_bytes": int(peak.split()[1]) * 1024}


def expert_config(name: str) -> ExpertConfig:
    """Return the configuration of a file in `cluster_configs/expert/`."""
    return parse_config(compose(["experiment=digits", f"expert={name}"])).expert


def run_training(name: str) -> dict[str, float]:
    """Train a network for three steps, and compare its FLOPs and memory with those that `ddm plan` counts."""
    torch.set_num_threads(2)
    configured, data, batch_size = MEASURED[name]
    network = configured or expert_config(name).network
    training = TrainingConfig(batch_size=batch_size, steps=3, warmup_steps=0, log_every=3)
    planned = measure_expert(ExpertConfig(network=network, training=training), data)
    seconds = time.monotonic()
    with watching_memory() as seen, tempfile.TemporaryDirectory() as folder:
        null_text = None if data.text_shape is None else TextEmbedding.zeros(*data.text_shape)
        model = build_network(network, data.latent_shape, data.num_classes, null_text)
        row, t, condition = torch.zeros(1, *data.latent_shape), torch.ones(1), Condition.null(1)
        measured_flops = 3 * forward_flops(lambda: call_network(model.eval(), row, t, condition))
        generator = torch.Generator().manual_seed(0)
        dataset = LatentDataset(
            clean=torch.randn(batch_size, *data.latent_shape, generator=generator),
            class_id=torch.full((batch_size,), -1),
            cluster_id=torch.zeros(batch_size, dtype=torch.int64),
        )
        fit(
            model,
            lambda network, batch: expert_loss(network, batch, "velocity", RECTIFIED_FLOW),
            dataset,
            training,
            Workspace.at(Path(folder)),
        )
    return {
        "parameters": planned.parameters,
        "planned_flops": planned.flops / training.steps / batch_size,
        "measured_flops": measured_flops,
        "planned_bytes": planned.memory_bytes,
        "measured_bytes": max(seen),
        "seconds": time.monotonic() - seconds,
    }


def law_claims(laws: dict[str, Laws]) -> Iterator[Claim]:
    """Yield the claims about the tiny networks."""
    classes = {case.partition("/")[0] for case in laws}
    count = f"{len(laws)} of {len(laws)}"
    for name, key in (
        ("forward and backward, a gradient for every parameter that is used", "trains"),
        ("save, and load strictly, bit-equal", "loads equal"),
        ("a text of another length is an error", "refuses lengths"),
    ):
        passed = sum(bool(result[key]) for result in laws.values())
        yield Claim(
            name=f"{len(classes)} backbones: {name}",
            bar=count,
            value=f"{passed} of {len(laws)}",
            spread="",
            holds=passed == len(laws),
        )
    rows = [result["row alone"] for result in laws.values()]
    yield Claim(
        name=f"{len(classes)} backbones: a row alone equals the row in a batch",
        bar=f"≤ {ROW_TOLERANCE:.0e}",
        value=f"{max(rows):.1e}",
        spread=f"{min(rows):.1e} to {max(rows):.1e}, n = {len(rows)}",
        holds=max(rows) <= ROW_TOLERANCE,
    )
    refused = [case for case, result in laws.items() if result["checkpointing"] == "refused"]
    equal = sum(result["checkpointing"] == "equal" for result in laws.values())
    yield Claim(
        name=f"{len(classes)} backbones: gradients with checkpointing equal those without, or it is refused by name",
        bar=count,
        value=f"{equal} equal, refused: {', '.join(refused)}",
        spread="",
        holds=equal + len(refused) == len(laws),
    )


def size_claims(counted: dict[str, Any], trainings: dict[str, dict[str, float]]) -> Iterator[Claim]:
    """Yield the claims about counted sizes."""
    ratios = [counted["sizes"][name]["parameters"] / 1e6 / published.millions for name, published in PUBLISHED.items()]
    yield Claim(
        name="published sizes in `ddm plan`: parameters over those of the published networks",
        bar="1 % off",
        value=f"{max(abs(ratio - 1) for ratio in ratios):.2%} off",
        spread=f"{min(ratios):.4f} to {max(ratios):.4f}, n = {len(ratios)}",
        holds=all(abs(ratio - 1) <= 0.01 for ratio in ratios),
    )
    yield Claim(
        name="memory of the process that counts all of them, up to 20 billion parameters",
        bar="< 1 GB",
        value=f"{counted['peak_bytes'] / GIGA:.2f} GB",
        spread="",
        holds=counted["peak_bytes"] < GIGA,
    )
    for name, planned, measured, bar in (
        ("FLOPs", "planned_flops", "measured_flops", 0.01),
        ("peak memory", "planned_bytes", "measured_bytes", 0.15),
    ):
        ratios = [training[planned] / training[measured] for training in trainings.values()]
        yield Claim(
            name=f"{name} of a training: counted over measured, {len(ratios)} trainings that fit here",
            bar=f"{bar:.0%} off",
            value=f"{max(abs(ratio - 1) for ratio in ratios):.1%} off",
            spread=f"{min(ratios):.3f} to {max(ratios):.3f}, n = {len(ratios)}",
            holds=all(abs(ratio - 1) <= bar for ratio in ratios),
        )


def law_listing(laws: dict[str, Laws]) -> Listing:
    """Return the conventions and results of each class."""
    rows = []
    for case, result in laws.items():
        adapter = adapter_of(case)
        reads = [name for name, value in (("class", adapter.reads_classes), ("text", adapter.reads_text)) if value]
        rows.append(
            (
                case,
                f"{adapter.time}{', minus' if adapter.sign < 0 else ''}",
                "2 x 2" if adapter.packs else "",
                ", ".join(reads),
                "yes" if adapter.reads_padding else "no" if adapter.reads_text else "",
                f"{result['row alone']:.1e}",
                result["checkpointing"],
            )
        )
    columns = (
        "class",
        "timestep, sign of the velocity",
        "packed",
        "reads",
        "reads padding",
        "row alone",
        "checkpointing",
    )
    return Listing(title="Conventions and results of each class at a tiny size", columns=columns, rows=rows)


def size_listing(counted: dict[str, Any]) -> Listing:
    """Return the sizes of the published networks."""
    rows = [
        (name, f"{size['parameters'] / 1e6:,.0f}", f"{size['flops'] / GIGA:,.0f}", f"{size['bytes'] / GIGA:,.1f}")
        for name, size in counted["sizes"].items()
    ]
    columns = ("expert=", "million parameters", "GFLOP a row forward", "GB of a training with one row")
    return Listing(title="Published sizes, counted", columns=columns, rows=rows)


def training_listing(trainings: dict[str, dict[str, float]]) -> Listing:
    """Return what was counted and measured of each training."""
    rows = [
        (
            name,
            f"{training['parameters'] / 1e6:.1f}",
            str(MEASURED[name][2]),
            f"{training['planned_flops'] / GIGA:.2f} / {training['measured_flops'] / GIGA:.2f}",
            f"{training['planned_bytes'] / GIGA:.2f} / {training['measured_bytes'] / GIGA:.2f}",
        )
        for name, training in trainings.items()
    ]
    columns = ("training", "million parameters", "batch", "GFLOP a row: counted / measured", "GB: counted / measured")
    return Listing(title="Trainings that were run", columns=columns, rows=rows)


if __name__ == "__main__":
    main()
