"""Rows of `benchmarks.papers` on quantization and caching: errors and bytes of small networks on digits."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from benchmarks.arms.paper_networks import select_digits, train_digits
from benchmarks.arms.paper_row import PaperRow
from ddm_core.artifacts import Workspace
from ensemble.compression.acceleration.adaptive_schedule import optimal_compute_steps
from ensemble.compression.acceleration.config import CacheConfig
from ensemble.compression.acceleration.feature_cache import cache_experts, observe_modules
from ensemble.compression.common.calibration_data import calibration_batches, output_error, run_network
from ensemble.compression.method import ExpertResult
from ensemble.compression.quantization.config import QuESTConfig, SVDQuantConfig
from ensemble.compression.quantization.quest import quantize_quest
from ensemble.compression.quantization.svdquant import quantize_svdquant
from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.sampling.sample import sample
from ensemble.solvers import uniform_times
from experts.codec import PixelCodec
from experts.config import TrainingConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.training.latent_dataset import Batch
from router.config import SelectionConfig

TUNING = TrainingConfig(steps=120, batch_size=32, lr=1e-3, warmup_steps=10, checkpoint_every=10**6)
LONG_TUNING = replace(TUNING, steps=400)
"""Tuning of the U-Net's sensitive layers, its convolutions among them."""
UNET_SETTINGS = " quantize.sensitive_convolutions=true quantize.sensitive.steps=400"
QUEST = QuESTConfig(time_embedding=TUNING, sensitive=TUNING, min_elements=256)
CALIBRATED = replace(QUEST, adaptive_rounding=False, time_embedding=None, sensitive=None)
SVDQUANT = SVDQuantConfig(rank=16, rank_share=1, branch_bits=8, refine=10, grid=10, rest_bits=None)
NAIVE = replace(SVDQUANT, rank=0, smooth=False, refine=0)
CACHE = CacheConfig(policy="adaptive", rows=8)
CACHED_STEPS = 20
INTERVALS = (2.0, 3.0, 4.0, 5.0)
NEW_SEED = 10**3


def measure_quest(folder: Path, kind: str) -> PaperRow:
    """Quantize a trained network to W4A4, with and without rounding and tuning, and compare on held-out digits."""
    expert, dataset = train_digits(kind, folder)
    held_out = calibration_batches(select_digits(kind, held_out=True), 64, NEW_SEED, 4)
    errors, results = dict[str, float](), dict[str, ExpertResult]()
    full = replace(QUEST, sensitive=LONG_TUNING, sensitive_convolutions=True) if kind == "unet" else QUEST
    one_grid = replace(CALIBRATED, channelwise=False, timewise=False)
    for name, config in {"tuned": full, "calibrated": CALIBRATED, "one grid a layer": one_grid}.items():
        results[name] = quantize_quest(expert, dataset, config, Workspace.at(folder / f"quest_{kind}_{name}"))
        errors[name] = output_error(results[name].network.model, expert, held_out)
    tuned, details = results["tuned"], results["tuned"].details
    ratio = errors["tuned"] / errors["calibrated"]
    stages = ", ".join(f"{name} {value:.4f}" for name, value in details["output_errors"].items())
    is_equal = _loads_equal(tuned.network, expert, held_out[0], folder / f"quest_{kind}")
    size = layer_bytes(folder / f"quest_{kind}", details["layers"]) / parameter_bytes(expert, details["layers"])
    return PaperRow(
        paper=f"QuEST (2402.03666), {'U-Net' if kind == 'unet' else 'DiT'}",
        says="tuning of the time embeddings, then of the sensitive layers, makes W4A4 usable",
        file="ensemble/compression/quantization/quest.py",
        command=f"ddm compress RUN quantize=quest{UNET_SETTINGS if kind == 'unet' else ''}",
        criterion="W4A4 error on held-out digits and new noise ≤ .75 × calibrated only; a load gives the same output",
        ours=(
            f"{ratio:.3f} × ({errors['tuned']:.4f} against {errors['calibrated']:.4f}; one grid a layer "
            f"{errors['one grid a layer']:.4f}); on calibration digits {stages}; {details['trained_share']:.3f} of the "
            f"parameters trained; loads equal: {is_equal}; bytes {size:.3f} × fp32 with grids of 20 times"
        ),
        theirs="W4A4 latent diffusion and Stable Diffusion that draw pictures, where calibration alone fails",
        differs="small network on digits; AdaRound on Gram matrices; error of the output, not FID",
        holds=ratio <= 0.75 and is_equal,
    )


def measure_svdquant_bytes(folder: Path) -> PaperRow:
    """Store the layers of a wider transformer as SVDQuant leaves them, and read them back."""
    expert, dataset = train_digits("wide_dit", folder)
    held_out = calibration_batches(select_digits("wide_dit", held_out=True), 64, NEW_SEED, 2)
    configs = {"ours": SVDQUANT, "naive": NAIVE, "rank 32 in 16 bits": replace(SVDQUANT, rank=32, branch_bits=16)}
    sizes, errors, is_equal = dict[str, float](), dict[str, float](), dict[str, bool]()
    for name, config in configs.items():
        result = quantize_svdquant(expert, dataset, config, Workspace.at(folder / "work"))
        paths, out = list(result.details["layers"]), folder / f"svdquant_{name}"
        is_equal[name] = _loads_equal(result.network, expert, held_out[0], out)
        sizes[name] = layer_bytes(out, paths) / parameter_bytes(expert, paths)
        errors[name] = output_error(result.network.model, expert, held_out)
    return PaperRow(
        paper="SVDQuant (2411.05007), bytes",
        says="4-bit residuals and a thin branch take a fraction of the memory",
        file="experts/compressed/quantization/svd_linear.py",
        command="ddm compress RUN quantize=svdquant quantize.rank=16 quantize.branch_bits=8",
        criterion="bytes on disk ≤ .16 × fp32 of the layers concerned; a load gives the same output bit for bit",
        ours=(
            f"{sizes['ours']:.4f} × at output error {errors['ours']:.4f}; without branch {sizes['naive']:.4f} × at "
            f"{errors['naive']:.4f}; rank 32 in 16 bits {sizes['rank 32 in 16 bits']:.4f} × at "
            f"{errors['rank 32 in 16 bits']:.4f}; loads equal: {all(is_equal.values())}"
        ),
        theirs="FLUX.1 3.6 × smaller than 16 bits (.14 × fp32)",
        differs="transformer of width 384 on digits; a layout of our own, no 4-bit kernels",
        holds=sizes["ours"] <= 0.16 and all(is_equal.values()),
    )


def measure_adaptive_cache(folder: Path, kind: str) -> PaperRow:
    """Cache features at four budgets with and without the union, and check the schedules by enumeration."""
    expert, _ = train_digits(kind, folder)
    sampling = SamplingConfig(solver="euler", steps=CACHED_STEPS, selection=SelectionConfig(name="full"))
    exact = _sample(expert, sampling)
    errors, shares = dict[int, list[float]](), dict[int, list[float]]()
    for bubbling in (3, 0):
        for interval in INTERVALS:
            config = replace(CACHE, interval=interval, bubbling=bubbling)
            cached = cache_experts({0: expert}, config, sampling, Workspace.at(folder / "work")).experts[0]
            if not isinstance(cached, Expert) or cached.cache is None:
                raise TypeError("caching returns a network with a cache")
            distance = float((_sample(cached, sampling) - exact).norm() / exact.norm())
            errors.setdefault(bubbling, []).append(distance)
            shares.setdefault(bubbling, []).append(sum(cached.cache.relative_flops) / CACHED_STEPS)
    times = tuple(uniform_times(8, expert.t_shift)[:-1].tolist())
    observed = observe_modules(expert, CACHE, times, Workspace.at(folder / "work")).similarities
    optimal = all(_is_optimal(matrix, count) for matrix in observed.values() for count in (2, 3, 4, 5))
    union, alone = ([*zip(errors[key], shares[key], strict=True)] for key in (3, 0))
    return PaperRow(
        paper=f"Block-wise adaptive caching (2506.13456), {'U-Net' if kind == 'unet' else 'DiT'}",
        says="each block has its own best steps, and the union of what feeds it keeps errors from growing",
        file="ensemble/compression/acceleration/adaptive_schedule.py",
        command="ddm compress RUN accelerate=cache accelerate.policy=adaptive",
        criterion="block-wise with union ≤ block-wise alone at four budgets; schedules equal those by enumeration",
        ours=(
            f"error (share of FLOPs) with union {_pairs(union)}; alone {_pairs(alone)}; {len(observed)} schedules of 8 "
            f"steps optimal at four budgets: {optimal}"
        ),
        theirs="3 × faster robot policies without loss",
        differs=f"digits in {CACHED_STEPS} Euler steps; the union computes more at the same budget",
        holds=optimal and all(a <= b for a, b in zip(errors[3], errors[0], strict=True)),
    )


def layer_bytes(folder: Path, paths: Sequence[str]) -> int:
    """Return the bytes of all tensors of these layers in a saved expert's files."""
    total = 0
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if any(name.startswith(f"{path}.") for path in paths)]  # noqa: SIM118
            total += sum(tensors.get_tensor(name).nbytes for name in names)
    return total


def parameter_bytes(expert: Expert, paths: Sequence[str]) -> int:
    """Return the bytes of the parameters of these layers in the network."""
    layers = (expert.model.get_submodule(path) for path in paths)
    return sum(parameter.nbytes for layer in layers for parameter in layer.parameters())


def _loads_equal(compressed: Expert, expert: Expert, batch: Batch, folder: Path) -> bool:
    """Save an expert, and return whether its loaded copy returns the same bits."""
    compressed.save(folder)
    with torch.no_grad():
        outputs = [run_network(model, expert, batch) for model in (compressed.model, Expert.load(folder).model)]
    return torch.equal(*outputs)


def _sample(expert: Expert, sampling: SamplingConfig) -> torch.Tensor:
    ensemble = Ensemble(experts={0: expert}, noise_schedule=RECTIFIED_FLOW)
    return sample(ensemble, PixelCodec(image_shape=(8, 8, 1)), range(64), sampling).latents


def _is_optimal(similarity: np.ndarray, count: int) -> bool:
    """Return whether no set of that many steps, the first among them, has a larger sum of similarities."""

    def total(chosen: tuple[int, ...]) -> float:
        return sum(float(similarity[max(step for step in chosen if step <= t), t]) for t in range(len(similarity)))

    best = max(total((0, *rest)) for rest in combinations(range(1, len(similarity)), count - 1))
    return total(optimal_compute_steps(similarity, count)) >= best - 1e-9


def _pairs(values: Sequence[tuple[float, float]]) -> str:
    return ", ".join(f"{error:.4f} ({share:.2f})" for error, share in values)


ROWS = {
    "quest_dit": lambda folder: measure_quest(folder, "dit"),
    "quest_unet": lambda folder: measure_quest(folder, "unet"),
    "svdquant_bytes": measure_svdquant_bytes,
    "adaptive_cache_dit": lambda folder: measure_adaptive_cache(folder, "dit"),
    "adaptive_cache_unet": lambda folder: measure_adaptive_cache(folder, "unet"),
}
"""Measurements, by the names of their rows."""
