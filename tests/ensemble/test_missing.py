"""Warnings about missing experts."""

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
    ("present", "share", "pattern"),
    [
        ((0, 1, 2), 0.1, r"1 of 4 experts is missing \(3\), trained on 10\.0 %"),
        ((1, 3), 0.6, r"2 of 4 experts are missing \(0, 2\), trained on 60\.0 %"),
    ],
)
def test_missing_warning_names_experts_and_share(present, share, pattern):
    ensemble = with_experts(*present)
    assert missing_share(ensemble) == pytest.approx(share)
    assert re.search(pattern, missing_warning(ensemble))


def test_missing_warning_of_complete_ensemble_is_empty():
    monolith = Ensemble(experts={0: MIXTURE.experts()[0]}, noise_schedule=RECTIFIED_FLOW)
    for ensemble in (with_experts(0, 1, 2, 3), monolith):
        assert missing_warning(ensemble) == "" and missing_share(ensemble) == 0
