"""Velocity, noise and clean predictions of one noised sample, and every conversion between them.

With x = alpha clean + sigma noise and u = alpha' clean + sigma' noise, two of the four give the other two:

    noise = (alpha u - alpha' x) / w     clean = (sigma' x - sigma u) / w     w = alpha sigma' - alpha' sigma
    clean = (x - sigma noise) / alpha     noise = (x - alpha clean) / sigma

The divisors of the second line vanish at one end of the schedule, so they are at least `MIN_DIVISOR`. Inside
[0.01, 0.99] that bound is never reached and every conversion is exact.

Exact conversion is not enough for a trained network. Near t = 1 its noise prediction has an error of a few per cent,
and sigma / alpha times that error destroys the clean estimate. So above `MAX_NOISE_TO_SIGNAL` the network is evaluated
at that ratio instead.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from experts.config import Prediction
from experts.diffusion.noise_schedule import NoisedSample, NoiseSchedule, expand
from experts.types import Latents, Times

MIN_DIVISOR = 1e-3

MAX_NOISE_TO_SIGNAL = 5.0
"""The noise-to-signal ratio above which a noise prediction gives no usable clean estimate. A lower value amplifies
errors less; a higher value evaluates fewer samples at another t than their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanAndNoise:
    """The two parts of a noised sample, which give its velocity on any noise schedule."""

    clean: Latents
    noise: Latents


def _from_velocity(velocity: Latents, noised: Latents, t: Times, noise_schedule: NoiseSchedule) -> CleanAndNoise:
    alpha, sigma, alpha_dot, sigma_dot = (
        noise_schedule.alpha(t),
        noise_schedule.sigma(t),
        noise_schedule.alpha_dot(t),
        noise_schedule.sigma_dot(t),
    )
    wronskian = alpha * sigma_dot - alpha_dot * sigma
    return CleanAndNoise(
        clean=(sigma_dot * noised - sigma * velocity) / wronskian,
        noise=(alpha * velocity - alpha_dot * noised) / wronskian,
    )


def _from_noise(noise: Latents, noised: Latents, t: Times, noise_schedule: NoiseSchedule) -> CleanAndNoise:
    return CleanAndNoise(
        clean=(noised - noise_schedule.sigma(t) * noise) / noise_schedule.alpha(t).clamp(min=MIN_DIVISOR), noise=noise
    )


def _from_clean(clean: Latents, noised: Latents, t: Times, noise_schedule: NoiseSchedule) -> CleanAndNoise:
    return CleanAndNoise(
        clean=clean, noise=(noised - noise_schedule.alpha(t) * clean) / noise_schedule.sigma(t).clamp(min=MIN_DIVISOR)
    )


_CONVERSIONS: dict[Prediction, Callable[[Latents, Latents, Times, NoiseSchedule], CleanAndNoise]] = {
    "velocity": _from_velocity,
    "noise": _from_noise,
    "clean": _from_clean,
}


def to_clean_and_noise(
    prediction: Prediction, predicted: Latents, noised: Latents, t: Times, noise_schedule: NoiseSchedule
) -> CleanAndNoise:
    """Return the clean sample and the noise that a prediction implies."""
    return _CONVERSIONS[prediction](predicted, noised, expand(t, noised), noise_schedule)


def to_velocity(
    prediction: Prediction, predicted: Latents, noised: Latents, t: Times, noise_schedule: NoiseSchedule
) -> Latents:
    """Return the velocity that a prediction implies; a velocity is returned unchanged."""
    if prediction == "velocity":
        return predicted
    parts = to_clean_and_noise(prediction, predicted, noised, t, noise_schedule)
    return noise_schedule.velocity(parts.clean, parts.noise, t)


def to_noise(
    prediction: Prediction, predicted: Latents, noised: Latents, t: Times, noise_schedule: NoiseSchedule
) -> Latents:
    """Return the noise that a prediction implies."""
    return to_clean_and_noise(prediction, predicted, noised, t, noise_schedule).noise


def to_clean(
    prediction: Prediction, predicted: Latents, noised: Latents, t: Times, noise_schedule: NoiseSchedule
) -> Latents:
    """Return the clean sample that a prediction implies."""
    return to_clean_and_noise(prediction, predicted, noised, t, noise_schedule).clean


def from_velocity(
    prediction: Prediction, velocity: Latents, noised: Latents, t: Times, noise_schedule: NoiseSchedule
) -> Latents:
    """Convert a velocity to a prediction of the given type."""
    if prediction == "velocity":
        return velocity
    parts = to_clean_and_noise("velocity", velocity, noised, t, noise_schedule)
    return parts.noise if prediction == "noise" else parts.clean


def training_target(
    prediction: Prediction, clean: Latents, noise: Latents, t: Times, noise_schedule: NoiseSchedule
) -> Latents:
    """Return the training target of this prediction type for a known clean sample and noise."""
    if prediction == "velocity":
        return noise_schedule.velocity(clean, noise, t)
    return noise if prediction == "noise" else clean


def clamp_noise_level(prediction: Prediction, sample: NoisedSample, noise_schedule: NoiseSchedule) -> NoisedSample:
    """Return the input at which to evaluate a network for a sample on the network's noise schedule.

    That is the sample itself, or for noise prediction the sample rescaled to at most `MAX_NOISE_TO_SIGNAL`.
    """
    if prediction != "noise":
        return sample
    t = torch.minimum(sample.t, noise_schedule.t_at(torch.full_like(sample.t, MAX_NOISE_TO_SIGNAL)))
    scale = torch.hypot(noise_schedule.alpha(t), noise_schedule.sigma(t)) / torch.hypot(
        noise_schedule.alpha(sample.t), noise_schedule.sigma(sample.t)
    )
    return NoisedSample(noised=sample.noised * expand(scale, sample.noised), t=t)


def clean_and_noise_at(
    prediction: Prediction,
    predicted: Latents,
    network_input: NoisedSample,
    sample: NoisedSample,
    noise_schedule: NoiseSchedule,
) -> CleanAndNoise:
    """Return the parts of `sample` from a prediction that was made at `network_input`, see `clamp_noise_level`."""
    parts = to_clean_and_noise(prediction, predicted, network_input.noised, network_input.t, noise_schedule)
    if prediction != "noise":
        return parts
    sample_noise = to_clean_and_noise("clean", parts.clean, sample.noised, sample.t, noise_schedule).noise
    is_clamped = expand(network_input.t, sample_noise) < expand(sample.t, sample_noise)
    return CleanAndNoise(clean=parts.clean, noise=torch.where(is_clamped, sample_noise, parts.noise))
