"""Tiles of the report: known runs in closed form."""

from pathlib import Path

import pytest

from orchestrator.config.compute import ResourcesConfig
from orchestrator.reporting.costs import CostRow
from orchestrator.reporting.results import ScoreRow
from orchestrator.reporting.summary import busy_seconds, fd_ratio, format_duration, summary_tiles
from orchestrator.run.attempts import Attempt


def score_row(name, **fd_by_space) -> ScoreRow:
    spaces = {space: {"fd": fd, "fd_floor": 0.5} for space, fd in fd_by_space.items()}
    return ScoreRow(name=name, scores={"num_samples": 1000, "spaces": spaces}, is_default=False)


def attempt(start, end) -> Attempt:
    return Attempt(
        stage="expert_0",
        attempt=1,
        folder=Path("attempt_1"),
        island="",
        place="",
        resources=ResourcesConfig(),
        start=start,
        end=end,
        state="finished",
        error="",
        cpu_s=0.0,
        progress=None,
        process={},
    )


def test_fd_ratio_is_the_geometric_mean_over_spaces():
    monolith = score_row("monolith", pixels=1.0, features=10.0)
    assert fd_ratio(score_row("sticky", pixels=4.0, features=10.0), monolith) == pytest.approx(2.0)
    assert fd_ratio(monolith, monolith) == 1.0


def test_fd_ratio_of_a_perfect_score_is_finite():
    assert 0 < fd_ratio(score_row("sticky", pixels=0.0), score_row("monolith", pixels=1.0)) < 1e-9


def test_best_tile_compares_ensembles_with_the_monolith():
    rows = [
        score_row("monolith", pixels=2.0),
        score_row("sticky", pixels=1.8),
        score_row("full", pixels=1.5),
        score_row("cluster_conditioned", pixels=0.1),
    ]
    samples, best = summary_tiles(rows, CostRow(stage="run"), [])
    assert samples.value == "1,000" and "4 scored models" in samples.note
    assert best.value == "0.75 ×" and "with full" in best.note and "monolith" in best.label


def test_best_tile_without_a_monolith_names_none():
    tiles = summary_tiles([score_row("sticky", pixels=1.8), score_row("full", pixels=1.5)], CostRow(stage="run"), [])
    assert tiles[1].value == "1.5" and "real images have 0.5" in tiles[1].note
    assert not any("monolith" in f"{tile.label} {tile.note}" for tile in tiles)


def test_cost_tile_shows_price_then_gpus_then_cpus():
    cpu = CostRow(stage="run", attempts=1, seconds=60.0, cpu_seconds=120.0)
    gpu = CostRow(stage="run", attempts=1, seconds=60.0, cpu_seconds=120.0, gpu_seconds=30.0, lost_s=6.0)
    paid = CostRow(stage="run", attempts=1, seconds=60.0, cpu_seconds=120.0, price=1.5)
    values = [summary_tiles([], costs, [])[0] for costs in (cpu, gpu, paid)]
    assert [tile.value for tile in values] == ["2 min 0 s", "30.0 s", "1.5"]
    assert "reserved CPU time" in values[0].note and "reserved GPU time; 6.0 s lost" in values[1].note
    assert "2 min 0 s of reserved CPU time" in values[2].note


def test_busy_seconds_count_overlaps_and_gaps_once():
    assert busy_seconds([attempt(20, 25), attempt(0, 10), attempt(5, 8), attempt(9, 12)]) == 17
    assert busy_seconds([]) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (59.4, "59.4 s"),
        (59.7, "1 min 0 s"),
        (75, "1 min 15 s"),
        (3599.9, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (86_399, "1 d 0 h"),
        (273_600, "3 d 4 h"),
    ],
)
def test_format_duration_has_two_units(seconds, text):
    assert format_duration(seconds) == text
