import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from experts.condition import Condition
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.training.latent_dataset import LatentDataset
from router.quality import calibration_split, measure_quality
from router.router import Router
from tests.oracles import MixtureOfGaussians

SHARES = (0.75, 0.25)
MIXTURE = MixtureOfGaussians(SHARES, deviation=0.2)


class ExactModel(nn.Module):
    """The exact posterior, as a network that does not look at classes."""

    def forward(self, noised: Tensor, t: Tensor, class_index: Tensor) -> Tensor:
        return MIXTURE.router().logits(noised, t, Condition.null(len(noised))).float()


class Thrice(ExactModel):
    """The same, three times too sure."""

    def forward(self, noised: Tensor, t: Tensor, class_index: Tensor) -> Tensor:
        return 3 * super().forward(noised, t, class_index)


def held_out(count: int) -> LatentDataset:
    generator = torch.Generator().manual_seed(0)
    cluster_id = (torch.arange(count) % 4 == 3).long()
    clean = MIXTURE.means[cluster_id] + 0.2 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return LatentDataset(clean=clean.float(), class_id=cluster_id, cluster_id=cluster_id)


COUNTS = torch.tensor([[30, 5], [0, 5], [30, 10]], dtype=torch.float64)
ROUTER = Router(model=ExactModel(), noise_schedule=RECTIFIED_FLOW, prior_counts=COUNTS)


def test_an_exact_router_meets_its_floors_at_both_ends() -> None:
    quality = measure_quality(ROUTER, held_out(1000))
    entropy = -sum(share * math.log(share) for share in SHARES)
    assert quality.prior_entropy_null == pytest.approx(entropy)
    assert quality.largest_share_null == 0.75
    assert quality.bins[0].accuracy == 1
    assert quality.bins[0].cross_entropy < 1e-3
    assert quality.bins[-1].cross_entropy_null == pytest.approx(entropy, abs=0.03)
    assert quality.bins[-1].accuracy_null == pytest.approx(0.75, abs=0.02)
    entropies = [figures.cross_entropy for figures in quality.bins]
    assert entropies == sorted(entropies)


def test_floors_with_a_condition_worked_out_by_hand() -> None:
    quality = measure_quality(ROUTER, held_out(40))
    mixed = -(30 / 35 * math.log(30 / 35) + 5 / 35 * math.log(5 / 35))
    assert quality.prior_entropy == pytest.approx(35 / 40 * mixed)
    assert quality.largest_share == 35 / 40


def test_the_same_numbers_at_every_call_and_bins_cover_all_t() -> None:
    quality = measure_quality(ROUTER, held_out(40))
    assert measure_quality(ROUTER, held_out(40)) == quality
    edges = [figures.t_low for figures in quality.bins] + [quality.bins[-1].t_high]
    assert edges == pytest.approx([index / 10 for index in range(11)])


def test_a_large_holdout_is_thinned_out() -> None:
    assert measure_quality(ROUTER, held_out(5000)).images <= 2048


def test_an_exact_router_is_as_well_calibrated_as_can_be_told() -> None:
    for row in measure_quality(ROUTER, held_out(1000)).bins:
        assert row.calibration_error == row.calibration_error_before
        assert row.calibration_error <= row.calibration_error_floor + 0.02


def test_a_router_that_is_too_sure_is_told_so_and_temperatures_mend_it() -> None:
    sure = replace(ROUTER, temperatures=torch.full((2, 10), 0.2, dtype=torch.float64))
    mended = replace(ROUTER, model=Thrice(), temperatures=torch.full((2, 10), 3.0, dtype=torch.float64))
    exact = measure_quality(ROUTER, held_out(400)).bins[-2]
    row = measure_quality(sure, held_out(400)).bins[-2]
    assert row.calibration_error > 2 * row.calibration_error_floor
    assert (row.cross_entropy_before, row.accuracy) == (exact.cross_entropy, exact.accuracy)
    again = measure_quality(mended, held_out(400)).bins[-2]
    assert again.cross_entropy == pytest.approx(exact.cross_entropy, rel=1e-5)
    assert again.cross_entropy_before > exact.cross_entropy + 0.1


def test_halves_share_no_sample_and_lose_none() -> None:
    whole = held_out(41)
    measured, between = calibration_split(whole)
    assert (len(measured), len(between)) == (21, 20)
    both = torch.cat([measured.clean, between.clean])
    assert {tuple(row) for row in both.tolist()} == {tuple(row) for row in whole.clean.tolist()}
    assert len(calibration_split(held_out(1))[0]) == 1
