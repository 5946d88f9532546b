"""What `benchmarks.compress` measures: every stage on trained experts, one dictionary of numbers for each seed.

Each part keeps what it has made and measured in its run folder, so that a stopped benchmark goes on where it was. The
numbers of every seed stay in `docs/benchmarks/found`, with the machine and the commit that they were measured on.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks.compress_arms import Arm, start_of, train, trained_on
from benchmarks.record import RESULTS, machine
from ddm_core.artifacts import read_json, write_json
from ensemble.compression.config import DynamicInt8Config, StitchConfig, WeightOnlyConfig
from ensemble.compression.measurement import REPORT_FILE, CompressionReport, model_bytes
from ensemble.compression.per_expert import RESULT_FILE
from ensemble.compression.pruning.config import EcoDiffConfig, LaptopConfig
from ensemble.compression.quantization.config import QuESTConfig, SharedBaseConfig, SVDQuantConfig
from ensemble.pipeline import DDMPipeline
from experts.compressed.quantization.int8_linear import computes_in_int8
from experts.compressed.quantization.shared_weight_io import bases_of
from experts.config import TrainingConfig
from experts.expert import Expert
from orchestrator.controller import project_commit
from router.router import Router

Found = dict[str, Any]
FOUND = RESULTS / "found"
INT8 = "processor computes in eight bits"
AGAIN = TrainingConfig(steps=250, batch_size=32, lr=1e-3, warmup_steps=20)
"""How a pruned network learns from the whole one; after 1,000 steps it is better than that, however it was pruned."""
RETRAINED = LaptopConfig(finetune=AGAIN)
"""Half of the parameters goes."""
LONGER = TrainingConfig(steps=1500, batch_size=32, lr=5e-4, warmup_steps=20)


def layers(seed: int, folder: Path) -> Found:
    """LAPTOP-Diff, EcoDiff and switching on the U-Net that all experts begin with."""
    arm = start_of("unet", seed, folder)
    ours = arm.made("laptop", replace(RETRAINED, additivity_sets=100))
    magnitude = arm.made("laptop-magnitude", replace(RETRAINED, criterion="magnitude"))
    plain = arm.made("laptop-no-features", replace(RETRAINED, feature_weight=0.0))
    details = details_of(ours)
    longer = trained_on("unet", seed, folder, AGAIN)
    found: Found = {
        "additivity": details["additivity"] | {"spearman_small": spearman_small(details["additivity"])},
        "share": details["share"],
        "pruned": {name: details_of(one)["error_pruned"] for name, one in (("ours", ours), ("magnitude", magnitude))},
        "retrained": {
            name: details_of(one)["error_retrained"]
            for name, one in (("ours", ours), ("magnitude", magnitude), ("no features", plain))
        },
        "kid": {name: arm.kid(one) for name, one in (("ours", ours), ("magnitude", magnitude))},
        "kid trained on": arm.kid(longer.whole),
        "pixels": {name: arm.ratio(one, "pixels", "fd") for name, one in (("ours", ours), ("magnitude", magnitude))},
    }
    for criterion in ("learned", "magnitude", "random"):
        eco = arm.made(f"ecodiff-{criterion}", EcoDiffConfig(criterion=criterion))
        found[f"ecodiff {criterion}"] = compared(eco).relative_l2
    for side, small in (("clean", "late"), ("noisy", "early")):
        mixed = arm.made(f"stitch-{small}", StitchConfig(small=small), ours)
        found[f"switch {side}"] = {"l2": compared(mixed).relative_l2, "kid": arm.kid(mixed), "flops": flops(mixed)}
    return found


def together(seed: int, folder: Path) -> Found:
    """Eight U-Nets in as few bytes as can be."""
    arm = train("unet", seed, folder)
    one = model_bytes(arm.whole) / 8
    recipes: Mapping[str, Any] = {
        "4 bits": WeightOnlyConfig(bits=4, group_size=32),
        "3 bits": WeightOnlyConfig(bits=3, group_size=32),
        "base of 8 bits, differences of 3": SharedBaseConfig(base_bits=8, bits=3, group_size=32),
        "5 bits": WeightOnlyConfig(bits=5, group_size=32),
        "base of 8 bits, differences of low rank": SharedBaseConfig(delta="low_rank", bits=8, group_size=32),
        "base of 8 bits, tailors": SharedBaseConfig(delta="tailors", bits=8, group_size=32),
        "base of 8 bits, differences of 2": SharedBaseConfig(base_bits=8, bits=2, group_size=32),
    }
    found: Found = {}
    for number, (name, recipe) in enumerate(recipes.items()):
        made = arm.made(f"together-{number}", recipe)
        memory = bytes_held(made) / bytes_held(arm.whole) * 8
        found[name] = {"bytes": model_bytes(made) / one, "memory": memory, "l2": compared(made).relative_l2}
        if name in SCORED:
            found[name] |= {"kid": arm.kid(made), "pixels": arm.ratio(made, "pixels", "fd")}
    return found


SCORED = ("4 bits", "base of 8 bits, differences of 3", "5 bits")
"""The others are compared by the distance of their images."""


def numbers(seed: int, folder: Path) -> Found:
    """SVDQuant, QuEST, compute in eight bits, and pruning with it, on a transformer of width 384."""
    arm = start_of("dit", seed, folder)
    whole = SVDQuantConfig(branch_bits=8, time_embedding=False)
    ablations = {
        "naive": replace(whole, smooth=False, rank=0, refine=0, rest_bits=None),
        "smooth": replace(whole, rank=0, refine=0, rest_bits=None),
        "low rank": replace(whole, smooth=False, refine=0, rest_bits=None),
        "svdquant": whole,
        SLIM: replace(whole, rank=12, rest_bits=4, time_embedding=True),
    }
    found: Found = {}
    for name, recipe in ablations.items():
        made = arm.made(f"svd_{name.replace(', ', '-').replace(' ', '-')}", recipe)
        errors = [one["output_error_of_layers"] for one in all_details(made)]
        found[name] = {"error": float(np.mean(errors)), "l2": compared(made).relative_l2, "bytes": in_bf16(made)}
    quest = arm.made("quest", QuESTConfig())
    errors = [one["output_errors"] for one in all_details(quest)]
    found["quest"] = {name: float(np.mean([one[name] for one in errors])) for name in errors[0]}
    found["quest share"] = all_details(quest)[0]["trained_share"]
    found["quest l2"] = compared(quest).relative_l2
    compute = arm.made("compute8", DynamicInt8Config())
    found["compute"] = speeds(arm, compute) | {"kid": arm.kid(compute), "l2": compared(compute).relative_l2}
    pruned = arm.made("laptop", replace(RETRAINED, ratio=PRUNED, finetune=LONGER, additivity_sets=100))
    found["additivity"] = details_of(pruned)["additivity"]
    found["pruned kid"] = arm.kid(pruned)
    small = arm.made("laptop-compute6", DynamicInt8Config(bits=6), pruned)
    found["both"] = speeds(arm, small) | {
        "bytes": compared(small).bytes_after / compared(small).bytes_before,
        "kid": arm.kid(small),
    }
    return found


SLIM = "svdquant, rank 12, all in 4 bits"
PRUNED = 0.25
"""Share of a transformer's parameters that goes before it is quantized."""


def speeds(arm: Arm, pipeline: Path) -> Found:
    """Processor time against the whole ensemble's, with and without `torch.compile` on both sides."""
    return {name: asdict(arm.cpu(pipeline, compile=name == "compiled")) for name in ("cpu", "compiled")}


Parts = Mapping[str, Callable[[int, Path], Found]]
PARTS: Parts = {"layers": layers, "together": together, "numbers": numbers}


def asked(description: str | None) -> argparse.Namespace:
    """How many seeds, where what is finished is kept, and whether it is all that is wanted."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-compress"), help="keeps what is finished")
    parser.add_argument("--kept", action="store_true", help="measure nothing more, write what is there")
    return parser.parse_args()


def all_found(folder: Path, seeds: int, parts: Parts, *, kept: bool) -> dict[str, list[Found]]:
    """The numbers of every part with every seed; or, if they are to be kept as they are, those that are there."""
    for seed, part in product(range(seeds), parts):
        measured = folder / _file(part, seed)
        if not kept:
            found_of(part, seed, folder, parts)
        if measured.exists():
            write_json(FOUND / measured.name, read_json(measured))
    files = {part: [FOUND / _file(part, seed) for seed in range(seeds)] for part in parts}
    return {part: [dict(read_json(file)) for file in some if file.exists()] for part, some in files.items()}


def found_of(part: str, seed: int, folder: Path, parts: Parts = PARTS) -> Found:
    """The numbers of a part, measured unless they are there already."""
    file = folder / _file(part, seed)
    if not file.exists():
        started = time.monotonic()
        found = parts[part](seed, folder) | {"machine": machine(), "commit": project_commit()}
        write_json(file, found | {INT8: computes_in_int8(), "seconds": time.monotonic() - started})
    print(f"{part}, seed {seed}: {json.dumps(read_json(file))[:2000]}", flush=True)
    return dict(read_json(file))


def origins(found: Mapping[str, Sequence[Found]]) -> tuple[float, str, str]:
    """Seconds of all parts together, and the machines and commits that they were measured on."""
    every = [seed for seeds in found.values() for seed in seeds]
    machines, commits = (sorted({one[key] for one in every}) for key in ("machine", "commit"))
    return sum(one["seconds"] for one in every), " and ".join(machines), ", ".join(commits)


def _file(part: str, seed: int) -> str:
    return f"{part}-{seed}.json"


def bytes_held(pipeline: Path) -> int:
    """Bytes of all tensors of a loaded pipeline's experts and router; what is shared counts once."""
    loaded = DDMPipeline.from_pretrained(pipeline).ensemble
    models = [expert.model for expert in loaded.experts.values() if isinstance(expert, Expert)]
    parts: list[nn.Module] = [*models, *(base.parts for base in bases_of(models).values())]
    parts += [loaded.router.model] if isinstance(loaded.router, Router) else []
    held = {tensor.data_ptr(): tensor.nbytes for part in parts for tensor in part.state_dict().values()}
    return sum(held.values())


def compared(pipeline: Path) -> CompressionReport:
    """The comparison with the whole ensemble."""
    return CompressionReport.read(pipeline / REPORT_FILE)


def flops(pipeline: Path) -> float:
    """FLOPs of an image over the whole ensemble's."""
    return compared(pipeline).flops_after / compared(pipeline).flops_before


def in_bf16(pipeline: Path) -> float:
    """Bytes over those of the whole ensemble in bfloat16."""
    return 2 * compared(pipeline).bytes_after / compared(pipeline).bytes_before


def all_details(pipeline: Path) -> list[Found]:
    """What a method said of every expert."""
    return [dict(read_json(path)["details"]) for path in sorted(pipeline.glob(f"expert_*/{RESULT_FILE}"))]


def details_of(pipeline: Path) -> Found:
    """What a method said of the only expert."""
    return all_details(pipeline)[0]


def spearman_small(additivity: Mapping[str, Any], most: int = 5) -> float:
    """The rank correlation over the sets of at most so many layers."""
    small = np.array(additivity["sizes"]) <= most
    sums, joint = (np.array(additivity[name])[small].argsort().argsort().astype(float) for name in ("sums", "joint"))
    return float(np.corrcoef(sums, joint)[0, 1])
