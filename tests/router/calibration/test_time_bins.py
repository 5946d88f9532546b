import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from router.calibration.time_bins import BINS, fit_logarithms, interpolate

SQUARES = torch.arange(BINS, dtype=torch.float64) ** 2


@pytest.mark.parametrize(
    ("t", "expected"), [(0.0, 0), (0.05, 0), (0.15, 1), (0.2, 2.5), (0.925, 76.75), (0.95, 81), (1.0, 81)]
)
def test_interpolate_matches_examples(t: float, expected: float) -> None:
    assert interpolate(SQUARES, torch.tensor([t], dtype=torch.float64)).item() == pytest.approx(expected)


@given(st.floats(0, 1), st.floats(-5, 5))
def test_interpolate_of_equal_numbers_is_constant(t: float, number: float) -> None:
    numbers = torch.full((BINS,), number, dtype=torch.float64)
    assert interpolate(numbers, torch.tensor([t])).item() == pytest.approx(number)


def test_interpolate_accepts_numbers_per_row() -> None:
    t = torch.tensor([0.15, 0.15], dtype=torch.float64)
    assert interpolate(torch.stack([SQUARES, -SQUARES]), t).tolist() == pytest.approx([1, -1])


def test_fit_logarithms_recovers_a_known_curve() -> None:
    t = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curve = torch.linspace(-1, 1, BINS, dtype=torch.float64)

    def loss(logarithms: Tensor) -> Tensor:
        return (logarithms - interpolate(curve, t)).square().mean()

    torch.testing.assert_close(fit_logarithms(loss, t), curve, atol=0.01, rtol=0)


def test_fit_logarithms_of_unbounded_loss_stays_finite() -> None:
    """A loss that always falls would take the factor to infinity."""
    t = torch.full((100,), 0.05)
    factors = fit_logarithms(lambda logarithms: -logarithms.mean() / 100, t)
    assert factors[0].item() == pytest.approx(1, abs=1e-3)
    assert factors[1:].abs().max() < 1e-6


def test_fit_logarithms_without_rows_is_zero() -> None:
    assert not fit_logarithms(lambda logarithms: logarithms.mean(), torch.zeros(0)).any()
