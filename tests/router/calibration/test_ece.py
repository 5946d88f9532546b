import pytest
import torch

from router.calibration.ece import calibration_error, calibration_error_floor


def said(confidence: list[float]) -> torch.Tensor:
    first = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([first, 1 - first], dim=1)


def test_error_worked_out_by_hand() -> None:
    """Three say .8 and two of them are right; one says .95 and is wrong."""
    probability, cluster_id = said([0.8, 0.8, 0.8, 0.95]), torch.tensor([0, 0, 1, 1])
    assert calibration_error(probability, cluster_id) == pytest.approx((abs(2 - 2.4) + 0.95) / 4)


def test_it_is_zero_where_as_many_are_right_as_were_said_to_be() -> None:
    probability = said([0.75] * 4 + [0.6] * 5)
    cluster_id = torch.tensor([0, 0, 0, 1, 0, 0, 0, 1, 1])
    assert calibration_error(probability, cluster_id) == pytest.approx(0)


def test_certain_and_right_has_neither_error_nor_floor() -> None:
    probability = said([1.0, 0.0, 1.0])
    assert calibration_error(probability, torch.tensor([0, 1, 0])) == 0
    assert calibration_error_floor(probability, 1, 0) == 0


def test_the_floor_is_what_a_calibrated_router_has() -> None:
    generator = torch.Generator().manual_seed(0)
    probability = torch.randn(2000, 4, generator=generator, dtype=torch.float64).softmax(-1)
    errors = [
        calibration_error(probability, torch.multinomial(probability, 1, generator=generator).squeeze(-1))
        for _ in range(20)
    ]
    assert calibration_error_floor(probability, 1, 0) == pytest.approx(sum(errors) / 20, rel=0.15)


def test_images_that_are_looked_at_again_tell_nothing_new() -> None:
    probability = said([0.7] * 100)
    once = calibration_error_floor(probability, 1, 0)
    assert calibration_error_floor(probability.repeat(4, 1), 4, 0) == pytest.approx(once)
    assert calibration_error_floor(probability.repeat(4, 1), 1, 0) < 0.75 * once
