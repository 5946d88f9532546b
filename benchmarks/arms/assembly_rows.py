"""Rows of `benchmarks.papers` on A-SDM: assembly, kernels merged by the time, inherited features, two networks by t."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.arms.paper_networks import select_digits, train_digits
from benchmarks.arms.paper_row import PaperRow
from ddm_core.artifacts import Workspace
from ensemble.compression.acceleration.config import CacheConfig
from ensemble.compression.acceleration.feature_cache import cache_experts
from ensemble.compression.common.calibration_data import calibration_batches, output_error
from ensemble.compression.method import ExpertResult
from ensemble.compression.pruning.assembly import prune_assembly
from ensemble.compression.pruning.config import AssemblyConfig
from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.sampling.sample import sample
from ensemble.solvers import uniform_times
from experts.codec import PixelCodec
from experts.conditions.condition import Condition
from experts.config import TrainingConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.expert_model import ExpertModel
from experts.networks.registry import call_network
from experts.time_split import TimeSplitExpert
from experts.training.flops import forward_flops
from router.config import SelectionConfig

NAMES = {"unet": "U-Net", "dit": "DiT", "mmdit": "MMDiT"}
TRAINING_STEPS = 150
TUNING = TrainingConfig(steps=TRAINING_STEPS, batch_size=32, lr=1e-3, warmup_steps=5, checkpoint_every=10**6)
ASSEMBLY = AssemblyConfig(ratio=0.3, rows=64, incubation=None, finetune=TUNING)
KERNELS = 4
KERNEL_RATIOS = {"unet": 0.2, "dit": 0.2, "mmdit": 0.4}
"""The larger of .2 and .4 at which some kept layer has the shapes of a removed one."""
NEW_SEED = 10**3
STEPS = 20
BATCH = 64
EULER = SamplingConfig(solver="euler", steps=STEPS, selection=SelectionConfig(name="full"))


def measure_assembly(folder: Path, kind: str) -> PaperRow:
    """Assemble networks in three orders, and train each in as many steps."""
    base = _assemble(folder, kind, "output_loss", ASSEMBLY)
    stages = len(base.details["removed"]) + len(base.details["narrowed"])
    alone = TRAINING_STEPS // (2 * stages)
    incubated = replace(
        ASSEMBLY,
        incubation=replace(TUNING, steps=alone),
        finetune=replace(TUNING, steps=TRAINING_STEPS - alone * stages),
    )
    results = {
        "shallow": _assemble(folder, kind, "shallow", replace(ASSEMBLY, order="shallow")),
        "incubated": _assemble(folder, kind, "incubated", incubated),
    }
    random = [
        _assemble(folder, kind, f"random_{seed}", replace(ASSEMBLY, order="random", seed=seed)) for seed in range(3)
    ]
    error, others = _error(base, kind, folder), [_error(result, kind, folder) for result in random]
    found = {name: _error(result, kind, folder) for name, result in results.items()}
    left = float(base.details["flops"])
    return PaperRow(
        paper=f"A-SDM (2406.00210), assembly, {NAMES[kind]}",
        says="a network assembled from kept layers and distilled is as good at fewer FLOPs; shallow layers leave first",
        file="ensemble/compression/pruning/assembly.py",
        command="ddm compress RUN prune=assembly prune.ratio=0.3",
        criterion="FLOPs .70 ± .01; error after distillation ≤ the mean of random layers distilled as long",
        ours=(
            f"FLOPs {left:.4f}, parameters {base.details['parameters']:.3f}; error {error:.4f} (before "
            f"{base.details['error_assembled']:.4f}); random {_joined(others)}; shallow first {found['shallow']:.4f} "
            f"(before {results['shallow'].details['error_assembled']:.4f}); block by block first, in as many steps, "
            f"{found['incubated']:.4f}"
        ),
        theirs="22.4 % faster Stable Diffusion",
        differs=f"digits, {TRAINING_STEPS} steps of 32; layers leave by output loss, units of others meet the share",
        holds=abs(left - 0.7) <= 0.01 and error <= sum(others) / len(others),
    )


def measure_kernels(folder: Path, kind: str) -> PaperRow:
    """Train a shortened network with one kernel a layer, with copies, and with the kernels of removed layers."""
    expert, _ = train_digits(kind, folder)
    ratio = KERNEL_RATIOS[kind]
    base = replace(ASSEMBLY, ratio=ratio)
    results = {
        "one": _assemble(folder, kind, "one", base),
        "copies": _assemble(folder, kind, "copies", replace(base, kernels=KERNELS, inherit=False)),
        "inherited": _assemble(folder, kind, "inherited", replace(base, kernels=KERNELS)),
        "semantic": _assemble(folder, kind, "semantic", replace(base, kernels=KERNELS, semantic_weight=0.1)),
    }
    errors = {name: _error(result, kind, folder) for name, result in results.items()}
    flops = {name: _batch_flops(result.network) for name, result in results.items()}
    cost, whole = flops["inherited"] / flops["one"], _batch_flops(expert)
    return PaperRow(
        paper=f"A-SDM (2312.15516, 2406.00210), kernels merged by the time, {NAMES[kind]}",
        says="several kernels a layer, those of pruned layers among them, recover quality at the speed of one",
        file="experts/compressed/conditional/kernel_experts.py",
        command=f"ddm compress RUN prune=assembly prune.ratio={ratio} prune.kernels=4",
        criterion=f"FLOPs at {BATCH} images ≤ 1.1 × one kernel's; error after equal training ≤ one kernel's",
        ours=(
            f"{cost:.4f} × the FLOPs ({flops['one'] / whole:.3f} of the original's); error {errors['inherited']:.4f} "
            f"inherited, {errors['copies']:.4f} copies, {errors['one']:.4f} one kernel, {errors['semantic']:.4f} "
            f"inherited with semantic supervision; {len(results['inherited'].details['kernels'])} layers, parameters "
            f"{results['inherited'].details['parameters']:.2f} against {results['one'].details['parameters']:.2f}"
        ),
        theirs="22 % faster U-Net at the quality of Stable Diffusion",
        differs="routing by t alone, not by features of the input",
        holds=cost <= 1.1 and errors["inherited"] <= errors["one"],
    )


def measure_inheritance(folder: Path, kind: str) -> PaperRow:
    """Inherit features on every other step at three levels, and compare with plain steps of as many FLOPs."""
    expert, _ = train_digits(kind, folder)
    exact, found = _sample(expert, EULER), list[str]()
    holds = True
    for level in ("block", "layer", "unit"):
        config = CacheConfig(level=level, interval=2, order=0)
        cached = cache_experts({0: expert}, config, EULER, Workspace.at(folder / "work")).experts[0]
        if not isinstance(cached, Expert) or cached.cache is None:
            raise TypeError("caching returns a network with a cache")
        share = sum(cached.cache.relative_flops) / STEPS
        inherited = _distance(_sample(cached, EULER), exact)
        fewer = _distance(_sample(expert, replace(EULER, steps=max(1, round(STEPS * share)))), exact)
        found.append(f"{level} {inherited:.4f} at {share:.2f} (fewer steps {fewer:.4f})")
        holds = holds and inherited <= fewer
    return PaperRow(
        paper=f"A-SDM (2406.00210), feature inheritance, {NAMES[kind]}",
        says="skipping blocks, layers or units on some steps is faster without training",
        file="ensemble/compression/acceleration/feature_cache.py",
        command="ddm compress RUN accelerate=cache accelerate.order=0 accelerate.interval=2 accelerate.level=block",
        criterion="distance to the samples of all steps ≤ that of as many FLOPs in fewer steps, at every level",
        ours="; ".join(found),
        theirs="40.0 % faster Stable Diffusion",
        differs=f"digits in {STEPS} Euler steps; distance of samples from the same noise",
        holds=holds,
    )


def measure_switching(folder: Path, kind: str) -> PaperRow:
    """Sample with an assembled network on some of the steps, early or late."""
    expert, _ = train_digits(kind, folder)
    small = _assemble(folder, kind, "output_loss", ASSEMBLY).network
    exact, times = _sample(expert, EULER), uniform_times(STEPS).tolist()
    share = _batch_flops(small) / _batch_flops(expert)
    found, deviation, late_wins = list[str](), 0.0, list[bool]()
    for count in (5, 10, 15):
        distances = []
        for is_late in (True, False):
            at = STEPS - count if is_late else count
            bound = (times[at - 1] + times[at]) / 2
            split = TimeSplitExpert(experts=(small, expert) if is_late else (expert, small), bounds=(bound,))
            ensemble = Ensemble(experts={0: split}, noise_schedule=RECTIFIED_FLOW)
            samples = sample(ensemble, PixelCodec(image_shape=(8, 8, 1)), range(BATCH), EULER)
            calls = samples.calls.full_calls
            ratio = (calls["0/0"] * (share if is_late else 1) + calls["0/1"] * (1 if is_late else share)) / (
                BATCH * STEPS
            )
            deviation = max(deviation, abs(ratio - (count * share + STEPS - count) / STEPS))
            distances.append(_distance(samples.latents, exact))
        late_wins.append(distances[0] <= distances[1])
        found.append(f"{count} steps: late {distances[0]:.4f}, early {distances[1]:.4f}")
    return PaperRow(
        paper=f"A-SDM (2406.00210), two networks by t, {NAMES[kind]}",
        says="the small network takes the early, noisy steps, the original the late ones",
        file="ensemble/compression/handover.py",
        command="ddm compress RUN prune=assembly stitch=small_early",
        criterion="FLOPs of the calls within .01 of the formula; early ≤ late at 5, 10 and 15 of 20 steps",
        ours=f"FLOPs off by {deviation:.4f}; {'; '.join(found)}",
        theirs="small early, judged by pictures",
        differs="distance to the original's samples from the same noise, which early errors move",
        holds=deviation <= 0.01 and not any(late_wins),
    )


def _assemble(folder: Path, kind: str, name: str, config: AssemblyConfig) -> ExpertResult:
    expert, dataset = train_digits(kind, folder)
    return prune_assembly(expert, dataset, config, Workspace.at(folder / f"assembly_{kind}_{name}"))


def _error(result: ExpertResult, kind: str, folder: Path) -> float:
    """Return the error of the output on held-out digits and new noise."""
    held_out = calibration_batches(select_digits(kind, held_out=True), 64, NEW_SEED, 4)
    return output_error(result.network.model, train_digits(kind, folder)[0], held_out)


def _batch_flops(expert: Expert) -> float:
    """Return the FLOPs of a call on a batch at one t."""
    rows, condition = torch.zeros(BATCH, *expert.latent_shape), Condition.null(BATCH)
    return forward_flops(lambda: call_network(expert.model, rows, torch.tensor(0.5), condition))


def _sample(expert: ExpertModel, sampling: SamplingConfig) -> torch.Tensor:
    ensemble = Ensemble(experts={0: expert}, noise_schedule=RECTIFIED_FLOW)
    return sample(ensemble, PixelCodec(image_shape=(8, 8, 1)), range(BATCH), sampling).latents


def _distance(samples: torch.Tensor, exact: torch.Tensor) -> float:
    return float((samples - exact).norm() / exact.norm())


def _joined(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


ROWS = {
    f"{name}_{kind}": lambda folder, measure=measure, kind=kind: measure(folder, kind)
    for name, measure, kinds in (
        ("assembly", measure_assembly, ("unet", "dit", "mmdit")),
        ("kernels", measure_kernels, ("unet", "dit", "mmdit")),
        ("inheritance", measure_inheritance, ("unet", "dit", "mmdit")),
        ("switching", measure_switching, ("unet", "dit")),
    )
    for kind in kinds
}
"""Measurements, by the names of their rows."""
