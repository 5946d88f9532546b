"""Selections that are exact with exact experts, and the bias of the others: two Gaussians in closed form.

A sample's deviation from the mean of its component, along the axis on which the two lie, has mean 0 and variance 1.
"""

import logging

import pytest
import torch

from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.sampling.sample import sample
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from router.config import SelectionConfig
from tests.oracles import IdentityCodec, MixtureOfGaussians

logger = logging.getLogger(__name__)

COUNT = 4000
DEVIATION = 0.3


def outward_bias(shares: tuple[float, float], **settings: object) -> float:
    """Return the mean distance of samples from their component's mean, away from the other one, in deviations."""
    mixture = MixtureOfGaussians(shares, deviation=DEVIATION, radius=1.0)
    ensemble = Ensemble(experts=mixture.experts(), noise_schedule=RECTIFIED_FLOW, router=mixture.router())
    config = SamplingConfig(solver="euler", steps=50, selection=SelectionConfig(**settings), batch_size=COUNT)
    samples = sample(ensemble, IdentityCodec(), range(COUNT), config).latents.double()
    component_mean = mixture.means[torch.cdist(samples, mixture.means).argmin(1)]
    mean = float(((samples - component_mean) * component_mean).sum(1).mean() / DEVIATION)
    logger.info("%s: %+.3f deviations outwards", settings, mean)
    return mean


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "sticky"},
        {"name": "sticky_resample", "t_switch": 0.5},
        {"name": "sticky_resample", "t_switch": 0.8},
        {"name": "full_then_sticky", "t_switch": 0.5},
        {"name": "full_then_sticky", "t_switch": 0.8},
        {"name": "sample"},
    ],
)
@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.8, 0.2)])
def test_posterior_draw_at_fixed_t_is_unbiased(shares: tuple[float, float], settings: dict[str, object]) -> None:
    assert abs(outward_bias(shares, **settings)) < 0.06


@pytest.mark.parametrize(
    ("name", "min_bias"),
    [("coupled_resample", 0.15), ("threshold_then_top1", 0.1), ("full_then_top1", 0.1), ("top_k", 0.5)],
)
def test_selection_that_follows_falling_posterior_is_biased(name: str, min_bias: float) -> None:
    """`coupled_resample` leaves an expert where its posterior falls along its trajectory, and never returns."""
    assert outward_bias((0.5, 0.5), name=name) > min_bias
