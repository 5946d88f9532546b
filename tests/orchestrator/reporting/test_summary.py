"""Tiles of the report: known runs in closed form."""

from pathlib import Path

import pytest

from orchestrator.config.compute import ResourcesConfig
from orchestrator.reporting.costs import CostRow
from orchestrator.reporting.summary import busy_seconds, fd_ratio, format_duration, summary_tiles
from orchestrator.reporting.tables.ranking import ScoreRow
from orchestrator.run.attempts import Attempt


def score_row(name, fd, *, held_out=1000, error=0.01, is_default=False) -> ScoreRow:
    other = {"fd": 0.5, "kid": 0.1}
    space = {"fd": fd, "fd_std": error, "kid": fd, "kid_std": error, "floor": other, "codec": other | {"fd": 0.7}}
    scores = {"num_samples": 1000, "held_out": held_out, "spaces": {"efficientnet_lite0": space}}
    return ScoreRow(name=name, scores=scores, is_default=is_default)


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


def test_best_tile_compares_ensembles_with_the_monolith():
    rows = [score_row(*row) for row in (("monolith", 2.0), ("sticky", 1.8), ("full", 1.5), ("cluster_conditioned", 1))]
    samples, best = summary_tiles(rows, CostRow(stage="run"), [])
    assert samples.value == "1,000" and "4 scored models" in samples.note
    assert best.value == "0.75 ×" and "with full" in best.note and "monolith" in best.label
    assert fd_ratio(rows[0], rows[0]) == 1.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"held_out": 499}, "there are 499 held-out images, and a ranking needs 500; raise data.holdout"),
        ({"error": 1.0}, "No difference seen at 1,000 samples; more with scores.num_samples="),
    ],
)
def test_best_tile_ranks_nothing_within_the_errors(changes, words):
    rows = [score_row("monolith", 2.0, **changes), score_row("sticky", 1.8, **changes)]
    _, tile = summary_tiles(rows, CostRow(stage="run"), [])
    assert tile.value == "not ranked" and words in tile.note


def test_tile_without_a_monolith_names_none():
    rows = [score_row("full", 1.5), score_row("sticky", 1.8, is_default=True)]
    tiles = summary_tiles(rows, CostRow(stage="run"), [])
    assert tiles[1].value == "1.5" and "the codec alone has 0.7, real images have 0.5" in tiles[1].note
    assert not any("monolith" in f"{tile.label} {tile.note}" for tile in tiles)
    unranked = summary_tiles([score_row("full", 1.5, error=1), rows[1]], CostRow(stage="run"), [])
    assert (unranked[1].label, unranked[1].value) == ("Score", "1.8")  # the default's, not the best of noise


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
