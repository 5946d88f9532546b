"""An ensemble says what it lacks."""

import re

import pytest

from ensemble.ensemble import Ensemble
from ensemble.membership import missing_share, missing_warning
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from tests.oracles import MixtureOfGaussians

MIXTURE = MixtureOfGaussians((0.4, 0.3, 0.2, 0.1))


def with_experts(*ids: int) -> Ensemble:
    experts = {k: expert for k, expert in MIXTURE.experts().items() if k in ids}
    return Ensemble(experts=experts, noise_schedule=RECTIFIED_FLOW, router=MIXTURE.router())


@pytest.mark.parametrize(
    ("present", "share", "said"),
    [
        ((0, 1, 2), 0.1, r"1 of 4 experts is missing \(3\), which stood for 10\.0 %"),
        ((1, 3), 0.6, r"2 of 4 experts are missing \(0, 2\), which stood for 60\.0 %"),
    ],
)
def test_it_names_who_is_missing_and_for_how_much_they_stood(present, share, said):
    ensemble = with_experts(*present)
    assert missing_share(ensemble) == pytest.approx(share)
    assert re.search(said, missing_warning(ensemble))


def test_a_whole_ensemble_and_a_monolith_say_nothing():
    alone = Ensemble(experts={0: MIXTURE.experts()[0]}, noise_schedule=RECTIFIED_FLOW)
    for ensemble in (with_experts(0, 1, 2, 3), alone):
        assert missing_warning(ensemble) == "" and missing_share(ensemble) == 0
