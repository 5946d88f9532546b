"""A monolith on all machines at once: the all-reduce formula, and who decides how long a step takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planning.synchronous_baseline import Worker, all_reduce_bytes, estimate_synchronous

RECIPE = {"parameters": 1_000_000, "batch_size": 400, "steps": 10, "checkpoint_every": 5, "restart_s": 60.0}


def test_a_ring_sends_twice_the_gradients_but_for_one_part():
    assert all_reduce_bytes(1_000_000, 1) == 0
    assert all_reduce_bytes(1_000_000, 2) == 4_000_000
    assert all_reduce_bytes(1_000_000, 4) == 6_000_000


@given(parameters=st.integers(1, 10**11), workers=st.integers(1, 10_000))
def test_more_workers_send_more_each_but_never_twice_the_gradients(parameters, workers):
    assert all_reduce_bytes(parameters, workers) <= all_reduce_bytes(parameters, workers + 1) < 8 * parameters


def test_four_equal_workers_by_hand():
    found = estimate_synchronous([Worker(images_per_s=50.0, price_per_hour=36.0)] * 4, **RECIPE)
    assert found.step_s == 2.0 and found.seconds == found.expected_s == 20.0
    assert found.price == pytest.approx(4 * 36 * 20 / 3600)
    assert found.bits_per_s == pytest.approx(8 * 6_000_000 / (0.1 * 2.0))
    assert found.total_bytes == 4 * 10 * 6_000_000


def test_the_slowest_worker_decides():
    quick, slow = Worker(images_per_s=1000.0), Worker(images_per_s=50.0)
    assert estimate_synchronous([quick, quick, quick, slow], **RECIPE).step_s == 2.0


def test_one_workers_loss_is_everybodys():
    workers = [Worker(images_per_s=1.0, preemptions_per_hour=0.5)] * 4
    alone = estimate_synchronous([Worker(images_per_s=4.0, preemptions_per_hour=0.5)], **RECIPE)
    together = estimate_synchronous(workers, **RECIPE)
    assert together.seconds == alone.seconds
    assert together.expected_s - together.seconds > 3 * (alone.expected_s - alone.seconds)


def test_one_worker_needs_no_network():
    found = estimate_synchronous([Worker(images_per_s=10.0)], **RECIPE)
    assert found.bits_per_s == found.total_bytes == 0.0
