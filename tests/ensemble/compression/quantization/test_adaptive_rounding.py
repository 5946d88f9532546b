"""AdaRound: no worse than the nearest integers, and near the best of all choices."""

import itertools

import pytest
import torch

from ensemble.compression.quantization.adaptive_rounding import choose_integers


def problem(rows, entries, seed=0):
    """Return weights over their scale, scales, and the Gram matrix of inputs that depend on each other."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, 3, generator=generator) @ torch.randn(3, entries, generator=generator)
    inputs = inputs + 0.3 * torch.randn(200, entries, generator=generator)
    numbers = 3 * torch.randn(rows, entries, generator=generator)
    return numbers, 0.1 * torch.ones(rows, 1), inputs.T @ inputs / 200


def error(integers, numbers, scales, gram):
    change = (integers - numbers.clamp(-8, 7)) * scales
    return float(((change @ gram) * change).sum())


@pytest.mark.parametrize("seed", range(3))
def test_chosen_integers_are_near_the_best_of_all(seed):
    numbers, scales, gram = problem(1, 10, seed)
    numbers = numbers.clamp(-7.9, 6.9)
    chosen = choose_integers(numbers, scales, gram, 4)
    candidates = [
        error(numbers.floor() + torch.tensor([up]), numbers, scales, gram)
        for up in itertools.product((0.0, 1.0), repeat=10)
    ]
    nearest = error(numbers.round(), numbers, scales, gram)
    assert ((chosen - numbers).abs() < 1).all()
    found = error(chosen, numbers, scales, gram)
    assert found - min(candidates) < 0.7 * (nearest - min(candidates))


def test_error_of_wide_rows_falls_to_a_tenth():
    numbers, scales, gram = problem(32, 64)
    numbers = numbers.clamp(-7.9, 6.9)
    chosen = choose_integers(numbers, scales, gram, 4)
    assert error(chosen, numbers, scales, gram) < 0.1 * error(numbers.round(), numbers, scales, gram)
    flipped = chosen.clone()
    flipped[:, 7] = torch.where(chosen > numbers, numbers.floor(), numbers.ceil())[:, 7]
    assert error(flipped, numbers, scales, gram) >= error(chosen, numbers, scales, gram)


def test_nearest_is_best_for_independent_inputs():
    numbers, scales, _ = problem(4, 32)
    chosen = choose_integers(numbers, scales, torch.eye(32), 4)
    assert torch.equal(chosen, numbers.round().clamp(-8, 7))


def test_integers_stay_within_their_bits():
    numbers, scales, gram = problem(4, 16)
    chosen = choose_integers(4 * numbers, scales, gram, 4)
    assert chosen.min() >= -8 and chosen.max() <= 7 and torch.equal(chosen, chosen.round())
