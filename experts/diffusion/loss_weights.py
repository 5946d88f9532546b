"""Weights of t in the loss of an expert, by name.

uniform   the same for every t, on the error of the network's own prediction
min_snr   min(SNR, gamma), on the error of the clean sample that the prediction implies
velocity  the same for every t, on the error of the velocity that the prediction implies
"""

from collections.abc import Callable

import torch

from experts.config import ExpertConfig, LossWeightName, Prediction
from experts.diffusion.noise_schedule import NoiseSchedule
from experts.diffusion.predictions import MAX_NOISE_TO_SIGNAL
from experts.types import Times

LossWeight = Callable[[Prediction, Times, NoiseSchedule], Times]
"""(prediction, t, noise schedule) to the weight of the squared error of that prediction."""


def min_snr_weight(prediction: Prediction, t: Times, noise_schedule: NoiseSchedule, gamma: float) -> Times:
    """Return the weight of the squared error of a prediction; finite for every t in [0, 1].

    Hang et al. 2023, arXiv:2303.09556, for any noise schedule: an error of the noise is sigma / alpha
    times as large in the clean sample, an error of the velocity sigma / (alpha sigma' - alpha' sigma) times.
    """
    alpha, sigma = noise_schedule.alpha(t), noise_schedule.sigma(t)
    if prediction == "clean":
        return (alpha / sigma).square().clamp(max=gamma)
    if prediction == "noise":
        return (gamma * (sigma / alpha).square()).clamp(max=1)
    wronskian = alpha * noise_schedule.sigma_dot(t) - noise_schedule.alpha_dot(t) * sigma
    return alpha.square().minimum(gamma * sigma.square()) / wronskian.square()


def velocity_weight(prediction: Prediction, t: Times, noise_schedule: NoiseSchedule, gamma: float) -> Times:
    """Return the weight that makes the squared error of a prediction that of its velocity; `gamma` is not used.

    An error of the noise is (alpha sigma' - alpha' sigma) / alpha times as large in the velocity, one of the clean
    sample as often over sigma. The divisor counts as the one at a ratio of sigma and alpha of `MAX_NOISE_TO_SIGNAL`
    or its inverse, beyond which no noise prediction is evaluated.
    """
    if prediction == "velocity":
        return torch.ones_like(t)
    bound = torch.full_like(t, MAX_NOISE_TO_SIGNAL)
    t = t.minimum(noise_schedule.t_at(bound)) if prediction == "noise" else t.maximum(noise_schedule.t_at(1 / bound))
    alpha, sigma = noise_schedule.alpha(t), noise_schedule.sigma(t)
    wronskian = alpha * noise_schedule.sigma_dot(t) - noise_schedule.alpha_dot(t) * sigma
    return (wronskian / (alpha if prediction == "noise" else sigma)).square()


LOSS_WEIGHTS: dict[LossWeightName, Callable[[Prediction, Times, NoiseSchedule, float], Times] | None] = {
    "uniform": None,
    "min_snr": min_snr_weight,
    "velocity": velocity_weight,
}
"""With gamma as the last argument; None is 1."""


def build_loss_weight(config: ExpertConfig) -> LossWeight | None:
    """Return the configured weight; None for a weight of 1."""
    weight = LOSS_WEIGHTS[config.loss_weight]
    if weight is None:
        return None
    return lambda prediction, t, noise_schedule: weight(prediction, t, noise_schedule, config.min_snr_gamma)
