"""Velocity, noise and clean predictions of one noised sample, and every conversion between them.

With x = alpha clean + sigma noise and u = alpha' clean + sigma' noise, two knowns give the other two:

    noise = (alpha u - alpha' x) / w     clean = (sigma' x - sigma u) / w     w = alpha sigma' - alpha' sigma
    clean = (x - sigma noise) / alpha     noise = (x - alpha clean) / sigma

The second line divides by what vanishes at an end of the path, so its divisors are floored at `FLOOR`;
inside [0.01, 0.99] no floor is reached and every conversion is exact.

Exact is not enough for a trained network: near t = 1 its noise prediction is right to a few per cent, and sigma / alpha
times that is no clean sample. So above `MOST_NOISE` it is `asked` as if the sample were there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from experts.config import Prediction
from experts.diffusion.noise_schedule import Latents, NoisedSample, NoiseSchedule, Times, expand

FLOOR = 1e-3

MAX_NOISE_TO_SIGNAL = 5.0
"""The noise-to-signal ratio above which a network's noise prediction tells no clean sample. Lower, errors grow less on
their way to the clean sample; higher, fewer values of t are asked about elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanAndNoise:
    """What a noised sample consists of; both together give its velocity on any path."""

    clean: Latents
    noise: Latents


def _parts_of_velocity(velocity: Latents, noised: Latents, t: Times, path: NoiseSchedule) -> CleanAndNoise:
    alpha, sigma, alpha_dot, sigma_dot = path.alpha(t), path.sigma(t), path.alpha_dot(t), path.sigma_dot(t)
    wronskian = alpha * sigma_dot - alpha_dot * sigma
    return CleanAndNoise(
        clean=(sigma_dot * noised - sigma * velocity) / wronskian,
        noise=(alpha * velocity - alpha_dot * noised) / wronskian,
    )


def _parts_of_noise(noise: Latents, noised: Latents, t: Times, path: NoiseSchedule) -> CleanAndNoise:
    return CleanAndNoise(clean=(noised - path.sigma(t) * noise) / path.alpha(t).clamp(min=FLOOR), noise=noise)


def _parts_of_clean(clean: Latents, noised: Latents, t: Times, path: NoiseSchedule) -> CleanAndNoise:
    return CleanAndNoise(clean=clean, noise=(noised - path.alpha(t) * clean) / path.sigma(t).clamp(min=FLOOR))


_CONVERSIONS: dict[Prediction, Callable[[Latents, Latents, Times, NoiseSchedule], CleanAndNoise]] = {
    "velocity": _parts_of_velocity,
    "noise": _parts_of_noise,
    "clean": _parts_of_clean,
}


def to_clean_and_noise(
    prediction: Prediction, predicted: Latents, noised: Latents, t: Times, path: NoiseSchedule
) -> CleanAndNoise:
    """The clean sample and the noise that a prediction implies."""
    return _CONVERSIONS[prediction](predicted, noised, expand(t, noised), path)


def to_velocity(prediction: Prediction, predicted: Latents, noised: Latents, t: Times, path: NoiseSchedule) -> Latents:
    """The velocity that a prediction implies; a velocity is returned untouched."""
    if prediction == "velocity":
        return predicted
    parts = to_clean_and_noise(prediction, predicted, noised, t, path)
    return path.velocity(parts.clean, parts.noise, t)


def to_noise(prediction: Prediction, predicted: Latents, noised: Latents, t: Times, path: NoiseSchedule) -> Latents:
    """The noise that a prediction implies."""
    return to_clean_and_noise(prediction, predicted, noised, t, path).noise


def to_clean(prediction: Prediction, predicted: Latents, noised: Latents, t: Times, path: NoiseSchedule) -> Latents:
    """The clean sample that a prediction implies."""
    return to_clean_and_noise(prediction, predicted, noised, t, path).clean


def from_velocity(prediction: Prediction, velocity: Latents, noised: Latents, t: Times, path: NoiseSchedule) -> Latents:
    """The prediction of the wanted kind that a velocity implies."""
    if prediction == "velocity":
        return velocity
    parts = to_clean_and_noise("velocity", velocity, noised, t, path)
    return parts.noise if prediction == "noise" else parts.clean


def training_target(prediction: Prediction, clean: Latents, noise: Latents, t: Times, path: NoiseSchedule) -> Latents:
    """What a network of this prediction should put out for a known clean sample and noise."""
    if prediction == "velocity":
        return path.velocity(clean, noise, t)
    return noise if prediction == "noise" else clean


def clamp_noise_level(prediction: Prediction, sample: NoisedSample, path: NoiseSchedule) -> NoisedSample:
    """Where a network is asked about a sample on its own path: there, or at `MOST_NOISE` if it puts out noise."""
    if prediction != "noise":
        return sample
    t = torch.minimum(sample.t, path.t_at(torch.full_like(sample.t, MAX_NOISE_TO_SIGNAL)))
    scale = torch.hypot(path.alpha(t), path.sigma(t)) / torch.hypot(path.alpha(sample.t), path.sigma(sample.t))
    return NoisedSample(noised=sample.noised * expand(scale, sample.noised), t=t)


def clean_and_noise_at(
    prediction: Prediction, predicted: Latents, seen: NoisedSample, sample: NoisedSample, path: NoiseSchedule
) -> CleanAndNoise:
    """The parts of a sample by what a network said where it was `asked`, at `seen`."""
    parts = to_clean_and_noise(prediction, predicted, seen.noised, seen.t, path)
    if prediction != "noise":
        return parts
    rest = to_clean_and_noise("clean", parts.clean, sample.noised, sample.t, path).noise
    is_above = expand(seen.t, rest) < expand(sample.t, rest)
    return CleanAndNoise(clean=parts.clean, noise=torch.where(is_above, rest, parts.noise))
