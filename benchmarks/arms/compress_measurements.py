"""Measurements for `benchmarks.compress`: every stage on trained experts, one dictionary of numbers per seed.

Each part stores its pipelines and measurements in its run folder, so that a stopped benchmark continues there. The
measurements of every seed are also stored in `docs/benchmarks/results`, with their machine and commit.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from benchmarks.arms.compress import Arm, train_ensemble, train_start, train_start_longer
from benchmarks.record import RESULTS, describe_machine
from ddm_core.artifacts import read_json, write_json
from ensemble.compression.config import DynamicInt8Config, StitchConfig, WeightOnlyConfig
from ensemble.compression.measurement import model_bytes
from ensemble.compression.per_expert import RESULT_FILE
from ensemble.compression.pruning.config import EcoDiffConfig, LaptopConfig
from ensemble.compression.quantization.config import QuESTConfig, SharedBaseConfig, SVDQuantConfig
from ensemble.compression.report import REPORT_FILE, CompressionReport
from ensemble.pipeline import EnsemblePipeline
from experts.compressed.quantization.int8_linear import computes_in_int8
from experts.compressed.quantization.shared_weight_io import collect_bases
from experts.config import TrainingConfig
from experts.expert import Expert
from orchestrator.controller import project_commit
from router.router import Router

Measurements = dict[str, Any]
"""Numbers by name; the names are the keys of the files in `docs/benchmarks/results`."""
MEASUREMENTS_FOLDER = RESULTS / "results"
INT8 = "processor computes in eight bits"
RETRAINING = TrainingConfig(steps=250, batch_size=32, lr=1e-3, warmup_steps=20)
"""Distillation of a pruned network from the original. After 1,000 steps it beats the original, whatever was pruned."""
RETRAINED = LaptopConfig(finetune=RETRAINING)
"""Removes half of the parameters."""
LONG_RETRAINING = TrainingConfig(steps=1500, batch_size=32, lr=5e-4, warmup_steps=20)
STITCH_SIDES: tuple[tuple[str, Literal["late", "early"]], ...] = (("clean", "late"), ("noisy", "early"))
"""Samples that the small network denoises, and the value of `StitchConfig.small` for it."""


def layers(seed: int, folder: Path) -> Measurements:
    """Measure LAPTOP-Diff, EcoDiff and stitching on the U-Net that all experts start from."""
    arm = train_start("unet", seed, folder)
    ours = arm.compress("laptop", replace(RETRAINED, additivity_sets=100))
    magnitude = arm.compress("laptop-magnitude", replace(RETRAINED, criterion="magnitude"))
    no_features = arm.compress("laptop-no-features", replace(RETRAINED, feature_weight=0.0))
    details = read_only_details(ours)
    longer = train_start_longer("unet", seed, folder, RETRAINING)
    criteria = (("ours", ours), ("magnitude", magnitude))
    measurements: Measurements = {
        "additivity": details["additivity"] | {"spearman_small": spearman_of_small_sets(details["additivity"])},
        "share": details["share"],
        "pruned": {name: read_only_details(pipeline)["error_pruned"] for name, pipeline in criteria},
        "retrained": {
            name: read_only_details(pipeline)["error_retrained"]
            for name, pipeline in (*criteria, ("no features", no_features))
        },
        "kid": {name: arm.kid_ratio(pipeline) for name, pipeline in criteria},
        "kid trained on": arm.kid_ratio(longer.original),
        "pixels": {name: arm.score_ratio(pipeline, "pixels", "fd") for name, pipeline in criteria},
    }
    for criterion in ("learned", "magnitude", "random"):
        ecodiff = arm.compress(f"ecodiff-{criterion}", EcoDiffConfig(criterion=criterion))
        measurements[f"ecodiff {criterion}"] = read_report(ecodiff).relative_l2
    for side, small in STITCH_SIDES:
        stitched = arm.compress(f"stitch-{small}", StitchConfig(small=small), ours)
        measurements[f"switch {side}"] = {
            "l2": read_report(stitched).relative_l2,
            "kid": arm.kid_ratio(stitched),
            "flops": flops_ratio(stitched),
        }
    return measurements


def together(seed: int, folder: Path) -> Measurements:
    """Measure the storage formats of eight U-Nets."""
    arm = train_ensemble("unet", seed, folder)
    expert_bytes = model_bytes(arm.original) / 8
    methods: Mapping[str, Any] = {
        "4 bits": WeightOnlyConfig(bits=4, group_size=32),
        "3 bits": WeightOnlyConfig(bits=3, group_size=32),
        "base of 8 bits, differences of 3": SharedBaseConfig(base_bits=8, bits=3, group_size=32),
        "5 bits": WeightOnlyConfig(bits=5, group_size=32),
        "base of 8 bits, differences of low rank": SharedBaseConfig(delta="low_rank", bits=8, group_size=32),
        "base of 8 bits, tailors": SharedBaseConfig(delta="tailors", bits=8, group_size=32),
        "base of 8 bits, differences of 2": SharedBaseConfig(base_bits=8, bits=2, group_size=32),
    }
    measurements: Measurements = {}
    for number, (name, method) in enumerate(methods.items()):
        compressed = arm.compress(f"together-{number}", method)
        measurements[name] = {
            "bytes": model_bytes(compressed) / expert_bytes,
            "memory": bytes_in_memory(compressed) / bytes_in_memory(arm.original) * 8,
            "l2": read_report(compressed).relative_l2,
        }
        if name in SCORED:
            measurements[name] |= {
                "kid": arm.kid_ratio(compressed),
                "pixels": arm.score_ratio(compressed, "pixels", "fd"),
            }
    return measurements


SCORED = ("4 bits", "base of 8 bits, differences of 3", "5 bits")
"""Formats that are scored; the others are compared by the distance of their images."""


def numbers(seed: int, folder: Path) -> Measurements:
    """Measure SVDQuant, QuEST, 8-bit compute, and pruning with it, on a transformer of width 384."""
    arm = train_start("dit", seed, folder)
    svdquant = SVDQuantConfig(branch_bits=8, time_embedding=False)
    ablations = {
        "naive": replace(svdquant, smooth=False, rank=0, refine=0, rest_bits=None),
        "smooth": replace(svdquant, rank=0, refine=0, rest_bits=None),
        "low rank": replace(svdquant, smooth=False, refine=0, rest_bits=None),
        "svdquant": svdquant,
        SLIM: replace(svdquant, rank=12, rest_bits=4, time_embedding=True),
    }
    measurements: Measurements = {}
    for name, method in ablations.items():
        compressed = arm.compress(f"svd_{name.replace(', ', '-').replace(' ', '-')}", method)
        layer_errors = [details["output_error_of_layers"] for details in read_all_details(compressed)]
        measurements[name] = {
            "error": float(np.mean(layer_errors)),
            "l2": read_report(compressed).relative_l2,
            "bytes": bytes_over_bfloat16(compressed),
        }
    quest = arm.compress("quest", QuESTConfig())
    quest_errors = [details["output_errors"] for details in read_all_details(quest)]
    measurements["quest"] = {
        name: float(np.mean([errors[name] for errors in quest_errors])) for name in quest_errors[0]
    }
    measurements["quest share"] = read_all_details(quest)[0]["trained_share"]
    measurements["quest l2"] = read_report(quest).relative_l2
    int8 = arm.compress("compute8", DynamicInt8Config())
    measurements["compute"] = measure_cpu_times(arm, int8) | {
        "kid": arm.kid_ratio(int8),
        "l2": read_report(int8).relative_l2,
    }
    pruned = arm.compress("laptop", replace(RETRAINED, ratio=PRUNED, finetune=LONG_RETRAINING, additivity_sets=100))
    measurements["additivity"] = read_only_details(pruned)["additivity"]
    measurements["pruned kid"] = arm.kid_ratio(pruned)
    pruned_int8 = arm.compress("laptop-compute6", DynamicInt8Config(bits=6), pruned)
    report = read_report(pruned_int8)
    measurements["both"] = measure_cpu_times(arm, pruned_int8) | {
        "bytes": report.bytes_after / report.bytes_before,
        "kid": arm.kid_ratio(pruned_int8),
    }
    return measurements


SLIM = "svdquant, rank 12, all in 4 bits"
PRUNED = 0.25
"""Share of a transformer's parameters that is pruned before quantization."""


def measure_cpu_times(arm: Arm, pipeline: Path) -> Measurements:
    """Measure processor time against the original ensemble's, with and without `torch.compile` on both sides."""
    return {name: asdict(arm.time_cpu(pipeline, compile=name == "compiled")) for name in ("cpu", "compiled")}


Parts = Mapping[str, Callable[[int, Path], Measurements]]
PARTS: Parts = {"layers": layers, "together": together, "numbers": numbers}


def parse_arguments(description: str | None) -> argparse.Namespace:
    """Parse the command line: `seeds`, `folder` and `report_only`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/bench-compress"), help="finished stages are kept here"
    )
    parser.add_argument(
        "--kept", dest="report_only", action="store_true", help="measure nothing; write the report of existing results"
    )
    return parser.parse_args()


def collect_measurements(folder: Path, seeds: int, parts: Parts, *, report_only: bool) -> dict[str, list[Measurements]]:
    """Return the measurements of every part, one dictionary per seed.

    With `report_only`, nothing is measured; only existing files are read.
    """
    for seed, part in product(range(seeds), parts):
        measured = folder / _file_name(part, seed)
        if not report_only:
            measure_part(part, seed, folder, parts)
        if measured.exists():
            write_json(MEASUREMENTS_FOLDER / measured.name, read_json(measured))
    files = {part: [MEASUREMENTS_FOLDER / _file_name(part, seed) for seed in range(seeds)] for part in parts}
    return {part: [dict(read_json(file)) for file in part_files if file.exists()] for part, part_files in files.items()}


def measure_part(part: str, seed: int, folder: Path, parts: Parts = PARTS) -> Measurements:
    """Measure a part, or read its measurements if they exist."""
    file = folder / _file_name(part, seed)
    if not file.exists():
        started = time.monotonic()
        measurements = parts[part](seed, folder) | {"machine": describe_machine(), "commit": project_commit()}
        write_json(file, measurements | {INT8: computes_in_int8(), "seconds": time.monotonic() - started})
    print(f"{part}, seed {seed}: {json.dumps(read_json(file))[:2000]}", flush=True)
    return dict(read_json(file))


def summarize_origins(parts: Mapping[str, Sequence[Measurements]]) -> tuple[float, str, str]:
    """Return the total seconds of all parts, their machines and their commits."""
    measured = [measurements for seeds in parts.values() for measurements in seeds]
    machines, commits = (sorted({measurements[key] for measurements in measured}) for key in ("machine", "commit"))
    return sum(measurements["seconds"] for measurements in measured), " and ".join(machines), ", ".join(commits)


def _file_name(part: str, seed: int) -> str:
    return f"{part}-{seed}.json"


def bytes_in_memory(pipeline: Path) -> int:
    """Return the bytes of all tensors of a loaded pipeline's experts and router; shared tensors count once."""
    loaded = EnsemblePipeline.from_pretrained(pipeline).ensemble
    models = [expert.model for expert in loaded.experts.values() if isinstance(expert, Expert)]
    modules: list[nn.Module] = [*models, *(base.parts for base in collect_bases(models).values())]
    modules += [loaded.router.model] if isinstance(loaded.router, Router) else []
    bytes_by_address = {
        tensor.data_ptr(): tensor.nbytes for module in modules for tensor in module.state_dict().values()
    }
    return sum(bytes_by_address.values())


def read_report(pipeline: Path) -> CompressionReport:
    """Read the comparison with the original ensemble."""
    return CompressionReport.read(pipeline / REPORT_FILE)


def flops_ratio(pipeline: Path) -> float:
    """Return the FLOPs of an image over the original ensemble's."""
    report = read_report(pipeline)
    return report.flops_after / report.flops_before


def bytes_over_bfloat16(pipeline: Path) -> float:
    """Return the bytes over those of the original ensemble in bfloat16."""
    report = read_report(pipeline)
    return 2 * report.bytes_after / report.bytes_before


def read_all_details(pipeline: Path) -> list[Measurements]:
    """Read the details that a method reports for every expert."""
    return [dict(read_json(path)["details"]) for path in sorted(pipeline.glob(f"expert_*/{RESULT_FILE}"))]


def read_only_details(pipeline: Path) -> Measurements:
    """Read the details of an ensemble of one expert."""
    return read_all_details(pipeline)[0]


def spearman_of_small_sets(additivity: Mapping[str, Any], max_size: int = 5) -> float:
    """Return the rank correlation over the sets of at most `max_size` layers."""
    is_small = np.array(additivity["sizes"]) <= max_size
    sums, joint = (np.array(additivity[name])[is_small].argsort().argsort().astype(float) for name in ("sums", "joint"))
    return float(np.corrcoef(sums, joint)[0, 1])
