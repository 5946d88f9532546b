"""Which selections are exact with exact experts: two Gaussians in closed form, so that bias has a size.

A sample's deviation from its own component, along the axis on which the two lie, has mean 0 and variance 1.
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


def outwards(shares: tuple[float, float], **chosen: object) -> float:
    """Mean distance of the samples from their component's mean, away from the other one, in deviations."""
    mixture = MixtureOfGaussians(shares, deviation=DEVIATION, radius=1.0)
    ensemble = Ensemble(experts=mixture.experts(), noise_schedule=RECTIFIED_FLOW, router=mixture.router())
    config = SamplingConfig(solver="euler", steps=50, selection=SelectionConfig(**chosen), batch_size=COUNT)
    found = sample(ensemble, IdentityCodec(), range(COUNT), config).latents.double()
    own = mixture.means[torch.cdist(found, mixture.means).argmin(1)]
    mean = float(((found - own) * own).sum(1).mean() / DEVIATION)
    logger.info("%s: %+.3f deviations outwards", chosen, mean)
    return mean


@pytest.mark.parametrize(
    "chosen",
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
def test_a_draw_from_the_posterior_at_fixed_t_changes_no_law(
    shares: tuple[float, float], chosen: dict[str, object]
) -> None:
    assert abs(outwards(shares, **chosen)) < 0.06


@pytest.mark.parametrize(
    ("name", "least"),
    [("coupled_resample", 0.15), ("threshold_then_top1", 0.1), ("full_then_top1", 0.1), ("top_k", 0.5)],
)
def test_what_follows_the_posterior_downhill_is_biased(name: str, least: float) -> None:
    """`coupled_resample` leaves an expert where its posterior falls along that expert's own path, and nobody comes back."""
    assert outwards((0.5, 0.5), name=name) > least
