"""Row of `benchmarks.papers` on one dense student of all experts, beside a network of all data in equal steps."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.neural_network import MLPClassifier
from torch import Tensor, nn

from benchmarks.arms.paper_networks import EXPERTS, NETWORKS, fit_digits, select_cluster, select_digits, train_experts
from benchmarks.arms.paper_row import PaperRow
from benchmarks.arms.time_rows import KIND, SAMPLES, SEEDS, TRAINING, draw_samples, measure_loss
from ddm_core.artifacts import Workspace
from ensemble.evaluation.metrics import frechet_distance
from experts.baselines.distilled_monolith import mean_parameters, student_loss
from experts.conditions.condition import Condition
from experts.config import TrainingConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.registry import build_network
from experts.training.latent_dataset import LatentDataset
from experts.training.trainer import fit

Figures = tuple[float, float, float]
"""Held-out loss, and the Fréchet distances of samples to held-out digits over pixels and over features of a probe."""
COMMON_STEPS = 100
"""Of the common start of all experts, on all data; each expert has the other steps on its cluster."""


def mean_network(experts: Mapping[int, Expert]) -> nn.Module:
    """Return a network with the means of the parameters of networks of equal shapes."""
    averaged = deepcopy(experts[0].model)
    averaged.load_state_dict(mean_parameters([expert.model for expert in experts.values()]))
    return averaged


def train_student(
    start: nn.Module, experts: Mapping[int, Expert], data: LatentDataset, training: TrainingConfig, folder: Path
) -> Expert:
    """Train a copy of a network on the velocities of each sample's expert, and return it with its running average."""

    def loss(network: nn.Module, batch: object) -> dict[str, Tensor]:
        return {"loss": student_loss(network, batch, experts, "velocity", RECTIFIED_FLOW)}  # type: ignore[arg-type]

    trained = fit(deepcopy(start), loss, data, training, Workspace.at(folder))
    return replace(experts[0], model=trained.model)


def measure_dense_student(folder: Path) -> PaperRow:
    """Train students from scratch, from an expert and from the experts' mean, in the monolith's steps, three seeds.

    A student's steps cost 4/3 of the monolith's, with its teachers' calls, and the experts as much as the monolith.
    """
    figures: dict[str, list[Figures]] = {}
    probe = fit_probe()
    _, data, _ = train_experts(folder, KIND, replace(TRAINING, steps=1, warmup_steps=1))
    for seed in range(SEEDS):
        training, place = replace(TRAINING, seed=seed), folder / f"seed_{seed}"
        scratch = _new_network(data, seed)
        common = fit_digits(deepcopy(scratch), data, 0, replace(training, steps=COMMON_STEPS), place / "common")
        own = replace(training, steps=training.steps - COMMON_STEPS, batch_size=training.batch_size // EXPERTS)
        experts = {
            k: fit_digits(deepcopy(common.model), select_cluster(data, k), 0, own, place / f"expert_{k}")
            for k in range(EXPERTS)
        }
        starts: dict[str, Callable[[], nn.Module]] = {
            "scratch": lambda scratch=scratch: scratch,
            "expert": lambda experts=experts: experts[0].model,
            "mean": lambda experts=experts: mean_network(experts),
        }
        trained = {"monolith": fit_digits(deepcopy(scratch), data, 0, training, place / "monolith")}
        longer = replace(training, steps=training.steps * 7 // 3)
        trained["monolith of as many FLOPs"] = fit_digits(deepcopy(scratch), data, 0, longer, place / "longer")
        trained["mean, untrained"] = replace(experts[0], model=mean_network(experts))
        for name, start in starts.items():
            trained[name] = train_student(start(), experts, data, training, place / f"student_{name}")
        for name, expert in trained.items():
            figures.setdefault(name, []).append(measure_all(expert, probe))
        print(seed, {name: rows[-1] for name, rows in figures.items()}, flush=True)
    ratios = {
        name: [[a[i] / b[i] for a, b in zip(rows, figures["monolith"], strict=True)] for i in range(3)]
        for name, rows in figures.items()
        if name != "monolith"
    }
    return PaperRow(
        paper="Decentralized Diffusion Models (2501.05450), dense student",
        says="one dense network distilled from the experts is as good as one trained on all data",
        file="experts/baselines/distilled_monolith.py",
        command="ddm run baselines=[distilled_monolith] distilled_monolith.from_mean=true expert.init=FOLDER",
        criterion="in the monolith's steps, from the mean of experts of one start: both distances ≤ 1.0 × (3 seeds)",
        ours="; ".join(
            f"{name} {_spread(pixels)} over pixels, {_spread(features)} over features, loss {_spread(loss)}"
            for name, (loss, pixels, features) in ratios.items()
        ),
        theirs="FID .99 of the monolith's at a quarter of its batch",
        differs=(
            f"four clusters of digits; {TRAINING.steps} steps, {COMMON_STEPS} of the experts' on all data; the student "
            "and its experts take 7/3 of the monolith's FLOPs"
        ),
        holds=max(_mean(values) for values in ratios["mean"][1:]) <= 1,
    )


def fit_probe() -> MLPClassifier:
    """Fit a classifier of digits whose hidden units are the features."""
    data = select_digits("dit", held_out=False)
    probe = MLPClassifier((32,), random_state=0, max_iter=300)
    return probe.fit(data.clean.flatten(1).numpy(), data.class_id.numpy())


def measure_all(expert: Expert, probe: MLPClassifier) -> Figures:
    """Return the loss and both distances of an expert without condition."""
    clean = select_digits("dit", held_out=True).clean.flatten(1).numpy()
    samples = draw_samples(expert.velocity, Condition.null(SAMPLES), expert.latent_shape).flatten(1).numpy()
    drawn, real = (np.maximum(rows @ probe.coefs_[0] + probe.intercepts_[0], 0) for rows in (samples, clean))
    return measure_loss(expert.velocity, 0), frechet_distance(samples, clean), frechet_distance(drawn, real)


def _new_network(data: LatentDataset, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_network(NETWORKS[KIND], data.latent_shape, 0)


def _spread(values: list[float]) -> str:
    return f"{_mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


ROWS: Mapping[str, Callable[[Path], PaperRow]] = {"dense_student": measure_dense_student}
