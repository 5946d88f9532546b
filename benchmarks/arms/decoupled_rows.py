"""Row of `benchmarks.papers` on consistency that is learned once for all clusters, then by an adapter for each.

Distances are squared MMDs of samples to the held-out digits of a cluster, in the mean of four clusters.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.arms.few_step_rows import TRAINING
from benchmarks.arms.paper_networks import select_cluster, train_experts
from benchmarks.arms.paper_row import PaperRow
from benchmarks.arms.time_rows import ROUTER
from ddm_core.artifacts import Workspace
from ensemble.compression.distillation.config import ConsistencyConfig
from ensemble.compression.distillation.consistency import train_consistency, train_consistency_student
from ensemble.compression.distillation.mmd import FINE, median_kernel, squared_mmd
from ensemble.compression.distillation.shared_student import add_change
from ensemble.compression.distillation.teacher import build_ensemble_teacher
from ensemble.ensemble import Ensemble
from ensemble.solvers import make_noise, sample_few_step
from experts.conditions.condition import Condition
from experts.diffusion.few_step import FewStepSchedule, StepType
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.training.latent_dataset import LatentDataset
from router.router import Router, count_priors
from router.train import fit_router

SHARED_STEPS, OWN_STEPS = 400, 100
RANK, STEPS, REPEATS = 4, 4, 8
CONSISTENCY = ConsistencyConfig(teacher=True, coupling=False, steps=STEPS, training=replace(TRAINING, lr=1e-3))


def distance_of(expert: Expert, held_out: LatentDataset, step_type: StepType, steps: int = STEPS) -> float:
    """Return the mean squared MMD of samples without condition to the held-out digits of one cluster."""
    few_step, real = FewStepSchedule.uniform(steps, step_type), held_out.clean.flatten(1)
    sampled, kernel, total = replace(expert, few_step=few_step), median_kernel("rbf", real, FINE), 0.0
    for repeat in range(REPEATS):
        seeds = range(repeat * len(real), (repeat + 1) * len(real))
        with torch.inference_mode():
            samples = sample_few_step(
                lambda noised, t: sampled.velocity(noised, t, Condition.null(len(noised))),
                make_noise(seeds, expert.latent_shape),
                few_step,
                RECTIFIED_FLOW,
                lambda step, seeds=seeds: make_noise(seeds, expert.latent_shape, 1 + step),
            )
        total += float(squared_mmd(samples.flatten(1), real, kernel))
    return total / REPEATS


def measure_decoupled(folder: Path) -> PaperRow:
    """Compare adapters of a shared student with students that learn everything in as many steps in all."""
    experts, data, held_out = train_experts(folder)
    clusters, real = ({k: select_cluster(part, k) for k in experts} for part in (data, held_out))
    shared = _train_shared(experts, data, held_out, SHARED_STEPS, folder)
    own_steps = SHARED_STEPS // len(experts) + OWN_STEPS

    def train(
        name: str, steps: int, rank: int | None, start: Callable[[Expert], nn.Module | None]
    ) -> dict[int, Expert]:
        config = replace(CONSISTENCY, adapter_rank=rank, training=replace(CONSISTENCY.training, steps=steps))
        results = {
            k: train_consistency(expert, clusters[k], config, Workspace.at(folder / f"{name} {k}"), start(expert))
            for k, expert in experts.items()
        }
        shares[name] = max(float(result.details["trained_share"]) for result in results.values())
        return {k: result.network for k, result in results.items()}

    def fuse(expert: Expert) -> nn.Module:
        return add_change(expert.model, shared.model, experts[0].model)

    shares = dict[str, float]()
    fused = train("fused", OWN_STEPS, RANK, fuse)
    arms = {
        "decoupled from each expert plus the shared change": fused,
        "decoupled from the shared student": train("student", OWN_STEPS, RANK, lambda expert: shared.model),
        "every student from its expert": train("joint", own_steps, None, lambda expert: None),
        "adapters without the shared student": train("alone", own_steps, RANK, lambda expert: None),
        "shared student": dict.fromkeys(experts, shared),
        "change without training": {k: replace(expert, model=fuse(expert)) for k, expert in experts.items()},
        "adapters of the next cluster": {k: fused[(k + 1) % len(experts)] for k in experts},
    }
    found = {
        name: _mean([distance_of(students[k], real[k], "renoise") for k in real]) for name, students in arms.items()
    }
    plain, whole = (_mean([distance_of(experts[k], real[k], "euler", steps) for k in real]) for steps in (STEPS, 50))
    best, wrong = found["decoupled from each expert plus the shared change"], found["adapters of the next cluster"]
    at_once = found["every student from its expert"], found["adapters without the shared student"]
    return PaperRow(
        paper="AnimateLCM (2402.00769), across clusters",
        says="consistency learned on one kind of data first, then with an adapter on the second, beats both at once",
        file="ensemble/compression/distillation/consistency.py",
        command="ddm compress RUN distill=decoupled distill.shared_start=change",
        criterion=(
            "steps in all equal: MMD ≤ those trained at once; adapters ≤ .2 of the parameters; 4 steps ≤ "
            ".7 × 4 plain steps; adapters of the next cluster > 1.5 ×"
        ),
        ours=(
            f"over {STEPS} plain steps: {'; '.join(f'{name} {value / plain:.2f}' for name, value in found.items())}; "
            f"50 plain steps {whole / plain:.2f}; {shares['fused']:.3f} of the parameters trained"
        ),
        theirs="a video in 4 steps and 1 second instead of 25",
        differs=f"clusters of digits, not videos; {SHARED_STEPS} shared steps, {OWN_STEPS} for each of 4 adapters",
        holds=best <= min(*at_once, 0.7 * plain) and shares["fused"] <= 0.2 and wrong > 1.5 * best,
    )


def _train_shared(
    experts: Mapping[int, Expert], data: LatentDataset, held_out: LatentDataset, steps: int, folder: Path
) -> Expert:
    """Distill the ensemble into one student, from the first expert."""
    out, counts = folder / "router", count_priors(data.cluster_id, data.class_id, len(experts), 0)
    if not out.is_dir():
        fit_router(ROUTER, data, held_out, out, Workspace.at(folder / "router_work"), counts, experts=experts)
    ensemble = Ensemble(experts=experts, noise_schedule=RECTIFIED_FLOW, router=Router.load(out))
    config = replace(CONSISTENCY, training=replace(CONSISTENCY.training, steps=steps))
    teacher, workspace = build_ensemble_teacher(ensemble, "cpu"), Workspace.at(folder / f"shared {steps}")
    return train_consistency_student(experts[0], teacher, 0.0, data, config, workspace).network


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


ROWS: Mapping[str, Callable[[Path], PaperRow]] = {"decoupled": measure_decoupled}
