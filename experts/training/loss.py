"""The training losses of an expert."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from experts.config import Prediction
from experts.diffusion.loss_weights import LossWeight
from experts.diffusion.noise_schedule import NoiseSchedule, expand, to_schedule
from experts.diffusion.predictions import clamp_noise_level, clean_and_noise_at, training_target
from experts.networks.registry import call_network
from experts.training.latent_dataset import Batch
from experts.types import Latents, RowTimes


def expert_loss(
    model: nn.Module,
    batch: Batch,
    prediction: Prediction,
    noise_schedule: NoiseSchedule,
    weight: LossWeight | None = None,
) -> Float[Tensor, ""]:
    """Return the mean squared error of the network's prediction, with a weight by t."""
    # Flow matching (Lipman et al. 2023, arXiv:2210.02747, equation 9), on the samples of one cluster only:
    # E || v_k(x, t, c) - u(x | clean) ||^2, x = alpha clean + sigma noise, u = alpha' clean + sigma' noise.
    noised = noise_schedule.add_noise(batch.clean, batch.noise, batch.t)
    predicted = call_network(model, noised, batch.t, batch.condition)
    target = training_target(prediction, batch.clean, batch.noise, batch.t, noise_schedule)
    return mean_squared_error(predicted.float(), target, batch.t, (prediction, noise_schedule), weight)


def mean_squared_error(
    predicted: Latents,
    target: Latents,
    t: RowTimes,
    space: tuple[Prediction, NoiseSchedule],
    weight: LossWeight | None,
) -> Float[Tensor, ""]:
    """Return the mean over all numbers of the weighted squared error of a prediction of this type and schedule."""
    if weight is None:
        return functional.mse_loss(predicted, target)
    return (expand(weight(space[0], t, space[1]), target) * (predicted - target).square()).mean()


def converted_loss(
    model: nn.Module,
    batch: Batch,
    source: tuple[Prediction, NoiseSchedule],
    target: tuple[Prediction, NoiseSchedule],
    weight: LossWeight | None = None,
) -> Float[Tensor, ""]:
    """Return the loss in another prediction and noise schedule than the network's, at equal noise-to-signal ratio.

    `source` is the network's prediction type and noise schedule, `target` those of the loss and its weight.
    """
    source_prediction, source_schedule = source
    prediction, noise_schedule = target
    noised = noise_schedule.add_noise(batch.clean, batch.noise, batch.t)
    sample = to_schedule(noised, batch.t, noise_schedule, source_schedule)
    network_input = clamp_noise_level(source_prediction, sample, source_schedule)
    predicted = call_network(model, network_input.noised, network_input.t, batch.condition).float()
    parts = clean_and_noise_at(source_prediction, predicted, network_input, sample, source_schedule)
    converted = training_target(prediction, parts.clean, parts.noise, batch.t, noise_schedule)
    exact = training_target(prediction, batch.clean, batch.noise, batch.t, noise_schedule)
    return mean_squared_error(converted, exact, batch.t, target, weight)
