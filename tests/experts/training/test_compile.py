"""A compiled network has the gradients of the plain one."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration

COMPARISON = """
import sys
from benchmarks.arms.trainer.cases import CASES
from benchmarks.arms.trainer.gradients import compare_gradients

(difference,) = compare_gradients(CASES[sys.argv[1]], ["compiled"])
print(difference)
"""


@pytest.mark.parametrize("case", ["MLP, small", "U-Net"])
def test_compiled_network_has_the_gradients_of_the_plain_one(case):
    # a process of its own: the compiler cannot trace the checks of types that tests have
    command = [sys.executable, "-c", COMPARISON, case]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout
    assert float(output) <= 1e-5
