"""Rows of `benchmarks.papers` on weights that experts share: tailors with gates against differences of low rank."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from benchmarks.arms.paper_networks import select_cluster, train_experts
from benchmarks.arms.paper_row import PaperRow
from benchmarks.arms.time_rows import KIND, TRAINING
from ddm_core.artifacts import Workspace
from ensemble.compression.common.calibration_data import HELD_OUT, calibration_batches, output_error
from ensemble.compression.method import EnsembleResult
from ensemble.compression.quantization.config import LearngenesConfig, SharedBaseConfig
from ensemble.compression.quantization.learngenes import share_learngenes
from ensemble.compression.quantization.shared_base import share_base
from experts.expert import Expert
from experts.training.latent_dataset import LatentDataset

LEARNGENES = LearngenesConfig()
ARMS = {
    "gates": replace(LEARNGENES, training=None),
    "fixed": replace(LEARNGENES, training=None, learn_gates=False),
    "gates, trained": LEARNGENES,
    "fixed, trained": replace(LEARNGENES, learn_gates=False),
    "gates, trained, unaligned": replace(LEARNGENES, align_weight=0.0),
}


def measure_learngenes(folder: Path) -> PaperRow:
    """Compress four experts of one start by differences of low rank, and by tailors with free and with fixed gates."""
    experts, data, held_out = train_experts(folder, KIND, TRAINING)
    plain = SharedBaseConfig(delta="low_rank", bits=LEARNGENES.bits, rounds=LEARNGENES.rounds)
    low_rank = share_base(experts, plain, Workspace.at(folder / "low_rank"))
    error, size = _error(low_rank, experts, held_out), _bytes(low_rank)
    ratios: dict[str, float] = {}
    smaller = True
    for name, config in ARMS.items():
        workspace = Workspace.at(folder / "learngenes" / name.replace(", ", "_"))
        result = share_learngenes(experts, data, config, workspace)
        ratios[name], smaller = _error(result, experts, held_out) / error, smaller and _bytes(result) <= size
        print(name, ratios[name], _bytes(result) / size, flush=True)
    return PaperRow(
        paper="DivControl (2507.23620), of experts",
        says="singular components that all share, with gates, keep what conditions differ by",
        file="ensemble/compression/quantization/learngenes.py",
        command="ddm compress RUN quantize=learngenes",
        criterion="bytes, rounds as low rank: error ≤ 1.0 × its, trained ≤ fixed gates trained; gates fixed > 1.0",
        ours=(
            f"{ratios['gates']:.3f} × low rank's ({error:.3f}), gates fixed {ratios['fixed']:.3f} ×; trained "
            f"{ratios['gates, trained']:.3f} × and {ratios['fixed, trained']:.3f} ×, without alignment "
            f"{ratios['gates, trained, unaligned']:.3f} ×; bytes no more: {smaller}"
        ),
        theirs="36.4 × less training for control by several conditions; no figures of a compression",
        differs="four experts of clusters of digits instead of conditions; the gates are parameters, not a network's",
        holds=(
            smaller
            and ratios["gates"] <= 1 < ratios["fixed"]
            and ratios["gates, trained"] <= min(1, ratios["fixed, trained"])
        ),
    )


def _error(result: EnsembleResult, experts: Mapping[int, Expert], held_out: LatentDataset) -> float:
    """Return the mean relative error of the experts' outputs on held-out digits of their own clusters."""
    errors = []
    for k, expert in experts.items():
        own = select_cluster(held_out, k)
        compressed = result.experts[k]
        if not isinstance(compressed, Expert):
            raise TypeError(f"expected an expert of one network, got {type(compressed).__name__}")
        errors.append(output_error(compressed.model, expert, calibration_batches(own, 64, 0, 8, HELD_OUT)))
    return sum(errors) / len(errors)


def _bytes(result: EnsembleResult) -> int:
    return int(result.details["bytes_shared"] + result.details["bytes_own"])


ROWS: Mapping[str, Callable[[Path], PaperRow]] = {"learngenes": measure_learngenes}
