"""Tests check types and shapes: a wrong result fails in the first calls of a function, in each test anew."""

import pytest
import torch
from jaxtyping import TypeCheckError

from ensemble.solvers import euler_step
from tests.type_checks import CHECKED_CALLS


@pytest.mark.parametrize("attempt", range(2))
def test_wrong_type_fails_in_the_first_calls_of_each_test(attempt):
    noised = torch.zeros(2, 3)
    with pytest.raises(TypeCheckError):
        euler_step(lambda noised, t: noised.to(torch.complex64), noised, 1.0, 0.5)
    with pytest.raises(TypeCheckError):
        euler_step(lambda noised, t: noised, noised.long(), 1.0, 0.5)
    for _ in range(CHECKED_CALLS):
        euler_step(lambda noised, t: noised, noised, 1.0, 0.5)
    assert euler_step(lambda noised, t: noised, noised.long(), 1.0, 0.5).shape == noised.shape
