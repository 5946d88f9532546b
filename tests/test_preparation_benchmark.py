"""The benchmark of the preparation of data at a tiny size, so that it cannot rot."""

import pytest

from benchmarks.preparation import TINY, measure


@pytest.mark.integration
def test_preparation_benchmark_runs(tmp_path):
    claims, listings = measure(tmp_path, TINY)
    assert len(claims) == 4 and all(listing.rows for listing in listings)
    same = next(row[1] for listing in listings for row in listing.rows if row[0] == "rows with the same centroid")
    assert float(same) == 1.0
    assert not list(tmp_path.iterdir())
