"""A monolith on all machines: the all-reduce formula, and the worker that determines the step time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.planning.synchronous_baseline import Worker, all_reduce_bytes, estimate_synchronous

TRAINING = {"parameters": 1_000_000, "batch_size": 400, "steps": 10, "checkpoint_every": 5, "restart_s": 60.0}


def test_ring_sends_twice_the_gradients_minus_one_part():
    assert all_reduce_bytes(1_000_000, 1) == 0
    assert all_reduce_bytes(1_000_000, 2) == 4_000_000
    assert all_reduce_bytes(1_000_000, 4) == 6_000_000


@given(parameters=st.integers(1, 10**11), workers=st.integers(1, 10_000))
def test_bytes_grow_with_workers_below_twice_the_gradients(parameters, workers):
    assert all_reduce_bytes(parameters, workers) <= all_reduce_bytes(parameters, workers + 1) < 8 * parameters


def test_four_equal_workers_equal_hand_calculation():
    run = estimate_synchronous([Worker(images_per_s=50.0, price_per_hour=36.0)] * 4, **TRAINING)
    assert run.step_s == 2.0 and run.seconds == run.expected_s == 20.0
    assert run.price == pytest.approx(4 * 36 * 20 / 3600)
    assert run.bits_per_s == pytest.approx(8 * 6_000_000 / (0.1 * 2.0))
    assert run.total_bytes == 4 * 10 * 6_000_000


def test_slowest_worker_determines_the_step_time():
    fast, slow = Worker(images_per_s=1000.0), Worker(images_per_s=50.0)
    assert estimate_synchronous([fast, fast, fast, slow], **TRAINING).step_s == 2.0


def test_loss_of_one_worker_delays_all():
    workers = [Worker(images_per_s=1.0, preemptions_per_hour=0.5)] * 4
    alone = estimate_synchronous([Worker(images_per_s=4.0, preemptions_per_hour=0.5)], **TRAINING)
    together = estimate_synchronous(workers, **TRAINING)
    assert together.seconds == alone.seconds
    assert together.expected_s - together.seconds > 3 * (alone.expected_s - alone.seconds)


def test_single_worker_needs_no_bandwidth():
    run = estimate_synchronous([Worker(images_per_s=10.0)], **TRAINING)
    assert run.bits_per_s == run.total_bytes == 0.0
