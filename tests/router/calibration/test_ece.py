import pytest
import torch

from router.calibration.ece import calibration_error, calibration_error_floor


def two_class_rows(confidence: list[float]) -> torch.Tensor:
    first = torch.tensor(confidence, dtype=torch.float64)
    return torch.stack([first, 1 - first], dim=1)


def test_calibration_error_matches_example() -> None:
    """Three rows have probability .8 and two of them are correct; one has .95 and is wrong."""
    probability, cluster_id = two_class_rows([0.8, 0.8, 0.8, 0.95]), torch.tensor([0, 0, 1, 1])
    assert calibration_error(probability, cluster_id) == pytest.approx((abs(2 - 2.4) + 0.95) / 4)


def test_calibration_error_of_calibrated_rows_is_zero() -> None:
    probability = two_class_rows([0.75] * 4 + [0.6] * 5)
    cluster_id = torch.tensor([0, 0, 0, 1, 0, 0, 0, 1, 1])
    assert calibration_error(probability, cluster_id) == pytest.approx(0)


def test_certain_correct_rows_have_zero_error_and_floor() -> None:
    probability = two_class_rows([1.0, 0.0, 1.0])
    assert calibration_error(probability, torch.tensor([0, 1, 0])) == 0
    assert calibration_error_floor(probability, 1, 0) == 0


def test_floor_equals_error_of_a_calibrated_router() -> None:
    generator = torch.Generator().manual_seed(0)
    probability = torch.randn(2000, 4, generator=generator, dtype=torch.float64).softmax(-1)
    errors = [
        calibration_error(probability, torch.multinomial(probability, 1, generator=generator).squeeze(-1))
        for _ in range(20)
    ]
    assert calibration_error_floor(probability, 1, 0) == pytest.approx(sum(errors) / 20, rel=0.15)


def test_repeated_images_do_not_lower_the_floor() -> None:
    probability = two_class_rows([0.7] * 100)
    once = calibration_error_floor(probability, 1, 0)
    assert calibration_error_floor(probability.repeat(4, 1), 4, 0) == pytest.approx(once)
    assert calibration_error_floor(probability.repeat(4, 1), 1, 0) < 0.75 * once
