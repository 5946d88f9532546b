import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.training.latent_dataset import LatentDataset
from router.quality import calibration_split, measure_quality
from router.router import Router
from tests.oracles import MixtureOfGaussians

SHARES = (0.75, 0.25)
MIXTURE = MixtureOfGaussians(SHARES, deviation=0.2)


class ExactModel(nn.Module):
    """The exact posterior, as a network that ignores classes."""

    def forward(self, noised: Tensor, t: Tensor, class_index: Tensor) -> Tensor:
        return MIXTURE.router().logits(noised, t, Condition.null(len(noised))).float()


class Overconfident(ExactModel):
    """The same with logits multiplied by 3."""

    def forward(self, noised: Tensor, t: Tensor, class_index: Tensor) -> Tensor:
        return 3 * super().forward(noised, t, class_index)


def held_out(count: int) -> LatentDataset:
    generator = torch.Generator().manual_seed(0)
    cluster_id = (torch.arange(count) % 4 == 3).long()
    clean = MIXTURE.means[cluster_id] + 0.2 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return LatentDataset(clean=clean.float(), class_id=cluster_id, cluster_id=cluster_id)


COUNTS = torch.tensor([[30, 5], [0, 5], [30, 10]], dtype=torch.float64)
ROUTER = Router(model=ExactModel(), noise_schedule=RECTIFIED_FLOW, prior_counts=COUNTS)


def test_exact_router_reaches_its_floors_at_both_ends() -> None:
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


def test_conditional_floors_match_example() -> None:
    quality = measure_quality(ROUTER, held_out(40))
    mixed = -(30 / 35 * math.log(30 / 35) + 5 / 35 * math.log(5 / 35))
    assert quality.prior_entropy == pytest.approx(35 / 40 * mixed)
    assert quality.largest_share == 35 / 40


def test_quality_is_deterministic_and_bins_cover_all_t() -> None:
    quality = measure_quality(ROUTER, held_out(40))
    assert measure_quality(ROUTER, held_out(40)) == quality
    edges = [figures.t_low for figures in quality.bins] + [quality.bins[-1].t_high]
    assert edges == pytest.approx([index / 10 for index in range(11)])


def test_large_holdout_is_subsampled() -> None:
    assert measure_quality(ROUTER, held_out(5000)).images <= 2048


def test_exact_router_has_minimal_calibration_error() -> None:
    for row in measure_quality(ROUTER, held_out(1000)).bins:
        assert row.calibration_error == row.calibration_error_before
        assert row.calibration_error <= row.calibration_error_floor + 0.02


def test_overconfident_router_is_corrected_by_temperatures() -> None:
    overconfident = replace(ROUTER, temperatures=torch.full((2, 10), 0.2, dtype=torch.float64))
    corrected = replace(ROUTER, model=Overconfident(), temperatures=torch.full((2, 10), 3.0, dtype=torch.float64))
    exact = measure_quality(ROUTER, held_out(400)).bins[-2]
    row = measure_quality(overconfident, held_out(400)).bins[-2]
    assert row.calibration_error > 2 * row.calibration_error_floor
    assert (row.cross_entropy_before, row.accuracy) == (exact.cross_entropy, exact.accuracy)
    corrected_row = measure_quality(corrected, held_out(400)).bins[-2]
    assert corrected_row.cross_entropy == pytest.approx(exact.cross_entropy, rel=1e-5)
    assert corrected_row.cross_entropy_before > exact.cross_entropy + 0.1


def test_calibration_split_is_disjoint_and_complete() -> None:
    dataset = held_out(41)
    quality_half, calibration_half = calibration_split(dataset)
    assert (len(quality_half), len(calibration_half)) == (21, 20)
    both = torch.cat([quality_half.clean, calibration_half.clean])
    assert {tuple(row) for row in both.tolist()} == {tuple(row) for row in dataset.clean.tolist()}
    assert len(calibration_split(held_out(1))[0]) == 1
