"""A compiled network has the gradients of the plain one."""

import pytest

from benchmarks.arms.trainer.cases import CASES
from benchmarks.arms.trainer.gradients import compare_gradients

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("case", ["MLP, small", "U-Net"])
def test_compiled_network_has_the_gradients_of_the_plain_one(case):
    (difference,) = compare_gradients(CASES[case], ["compiled"])
    assert difference <= 1e-5
