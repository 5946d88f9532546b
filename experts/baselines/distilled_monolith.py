"""Distilled monolith: one dense network that learns from the experts, each on samples of its cluster, without a router.

McAllister et al. 2025 (arXiv:2501.05450, section on distillation) match the monolith at a quarter of its batch, and do
not count the training of the experts. Here all three parts are counted: student, teachers' calls, experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddm_core.artifacts import Workspace, read_json, write_json
from experts.codecs.registry import load_codec
from experts.config import ExpertConfig, Prediction
from experts.diffusion.loss_weights import LossWeight, build_loss_weight
from experts.diffusion.noise_schedule import NoiseSchedule
from experts.diffusion.predictions import from_velocity, training_target
from experts.expert import Expert, ExpertSummary, network_flops, train_network
from experts.networks.class_settings import NetworkError
from experts.networks.pretrained import InitialModel, build_initial_model
from experts.networks.registry import call_network
from experts.training.held_out import TrainingData
from experts.training.latent_dataset import Batch
from experts.training.latents.folder import read_class_names
from experts.training.loss import mean_squared_error


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilledMonolithSummary:
    """FLOPs of a distillation, by part."""

    student: float
    """Training of the student."""
    teachers: float
    """Calls of the experts during that training."""
    experts: float
    """Earlier training of the experts."""

    @property
    def flops(self) -> float:
        """Return the FLOPs of this stage; those of the experts belong to their stages."""
        return self.student + self.teachers


def train_distilled_monolith(
    config: ExpertConfig,
    teachers: Mapping[int, Path],
    clusters: Sequence[Path],
    codec: Path,
    out: Path,
    workspace: Workspace,
    held_out: Sequence[Path] = (),
    *,
    from_mean: bool = False,
) -> DistilledMonolithSummary:
    """Train on the samples of all clusters and write the student to `out`, an expert with `distilled_monolith.json`.

    Samples of a cluster without a teacher have their own training target, as for an expert. With `from_mean` the
    student starts from the mean of the teachers' parameters; raises `NetworkError` where they are of other shapes.
    """
    data = TrainingData.open(clusters, held_out, load_codec(codec), codec, workspace)
    dataset, num_classes = data.samples, len(read_class_names(clusters[0]))
    data.check_classes(num_classes)
    initial_model = build_initial_model(config, dataset.latent_shape, num_classes, dataset.null_text)
    experts = {k: Expert.load(folder) for k, folder in teachers.items()}
    if from_mean:
        _start_from_mean(initial_model, experts)
    for expert in experts.values():
        expert.to(config.training.device)

    def loss(model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        prediction, noise_schedule = initial_model.prediction, initial_model.noise_schedule
        return {"loss": student_loss(model, batch, experts, prediction, noise_schedule, build_loss_weight(config))}

    trained = train_network(config.training, data, initial_model, loss, out, workspace, num_classes)
    shares = torch.bincount(dataset.cluster_id, minlength=len(clusters)).double() / len(dataset)
    summary = _summary(trained, config, experts, teachers, shares.tolist(), dataset.latent_shape)
    write_json(out / "distilled_monolith.json", summary)
    return summary


def _start_from_mean(initial_model: InitialModel, experts: Mapping[int, Expert]) -> None:
    """Give a network the mean of the experts' parameters, in place; raises `NetworkError`."""
    ours = initial_model.prediction, initial_model.noise_schedule
    if others := [k for k, expert in experts.items() if (expert.prediction, expert.noise_schedule) != ours]:
        raise NetworkError(
            f"distilled_monolith.from_mean needs experts of the student's prediction {ours[0]} and noise schedule; "
            f"experts {others} have others; leave it out"
        )
    try:
        initial_model.model.load_state_dict(mean_parameters([expert.model for expert in experts.values()]))
    except (KeyError, RuntimeError) as error:
        raise NetworkError(
            f"distilled_monolith.from_mean needs experts with the student's network, and theirs differ ({error}); "
            "leave it out"
        ) from error


def mean_parameters(networks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Return the mean of each tensor of networks of equal shapes; the first one's where it holds no real numbers.

    Wortsman et al. 2022, arXiv:2203.05482: networks that were trained from one start are often in one basin, and their
    mean is close to it. Raises `KeyError` or `RuntimeError` for other shapes.
    """
    first, *others = [network.state_dict() for network in networks]
    return {
        name: torch.stack([value, *(state[name] for state in others)]).mean(0) if value.is_floating_point() else value
        for name, value in first.items()
    }


def student_loss(
    model: nn.Module,
    batch: Batch,
    teachers: Mapping[int, Expert],
    prediction: Prediction,
    noise_schedule: NoiseSchedule,
    weight: LossWeight | None = None,
) -> Float[Tensor, ""]:
    """Return the mean squared distance between the student and the expert of each sample's cluster, with a weight."""
    # E || v_student(x, t, c) - v_k(x, t, c) ||^2, x = alpha clean + sigma noise, clean in cluster k.
    noised = noise_schedule.add_noise(batch.clean, batch.noise, batch.t)
    target = training_target(prediction, batch.clean, batch.noise, batch.t, noise_schedule)
    with torch.no_grad():
        for k, teacher in teachers.items():
            rows = (batch.cluster_id == k).nonzero().squeeze(-1)
            if len(rows):
                velocity = teacher.velocity(noised[rows], batch.t[rows], batch.condition.rows(rows), noise_schedule)
                teacher_prediction = from_velocity(prediction, velocity, noised[rows], batch.t[rows], noise_schedule)
                target = target.index_copy(0, rows, teacher_prediction.to(target.dtype))
    predicted = call_network(model, noised, batch.t, batch.condition)
    return mean_squared_error(predicted.float(), target, batch.t, (prediction, noise_schedule), weight)


def _summary(
    trained: ExpertSummary,
    config: ExpertConfig,
    experts: Mapping[int, Expert],
    folders: Mapping[int, Path],
    shares: Sequence[float],
    latent_shape: tuple[int, ...],
) -> DistilledMonolithSummary:
    """Return the costs; each teacher is called on its cluster's share of all rows."""
    rows = config.training.batch_size * config.training.steps
    calls = sum(rows * shares[k] * network_flops(expert.to("cpu").model, latent_shape) for k, expert in experts.items())
    training_cost = sum(float(read_json(folder / "training.json")["flops"]) for folder in folders.values())
    return DistilledMonolithSummary(student=trained.flops, teachers=calls, experts=training_cost)
