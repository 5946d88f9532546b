"""The benchmark of a GPU runs on a CPU, so that it cannot rot."""

import pytest

from benchmarks.gpu import measure, tiny_size


@pytest.mark.slow
def test_gpu_benchmark_runs_on_a_cpu():
    claims, (training, sampling, layers) = measure(
        tiny_size(), {"plain": {}, "checkpointing": {"gradient_checkpointing": True}}
    )
    assert [(row[0], row[1]) for row in training.rows][:3] == [
        ("DiT-B/2", "plain loop"),
        ("DiT-B/2", "plain"),
        ("DiT-B/2", "checkpointing"),
    ]
    assert len(claims) == 1 and len(training.rows) == 9
    assert [row[0] for row in sampling.rows] == ["all", "grouped", "paged"]
    errors = [float(row[3]) for row in layers.rows]
    assert errors[0] == 0 < errors[1] < errors[2] < 0.5
