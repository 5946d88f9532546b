"""The benchmark of streaming runs at a tiny size, so that it cannot rot; what it counts must be right at any speed."""

import pytest

from benchmarks.streaming import TINY_SIZE, measure


@pytest.mark.integration
def test_streaming_benchmark_runs(tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "NO_PROXY"):
        monkeypatch.setenv(name, "test")
    claims, (speeds, kept) = measure(tmp_path, TINY_SIZE)
    assert [row[0] for row in speeds.rows] == ["S3", "slow disk"]
    assert "partition" in {row[0] for row in kept.rows}
    counted = {claim.name.partition(":")[0]: claim.holds for claim in claims if " of " in claim.bar}
    assert counted == {"S3": True, "slow disk": True, "trainer and its readers killed at random instants": True}
