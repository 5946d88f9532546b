"""What the table of scores may call better: nothing within its errors, nothing against few images."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from orchestrator.reporting.tables.ranking import ScoreRow, is_blurred, rank_rows
from orchestrator.reporting.tables.score_table import score_table

NAMES = ("monolith", "sticky", "full_then_sticky_0.5")
OTHER = {"fd": 20.0, "kid": 0.01, "precision": 0.8}


def score_row(name, fd, kid, error, *, held_out=1000, p_value=0.5) -> ScoreRow:
    space = {"fd": fd, "fd_std": error, "kid": kid, "kid_std": error, "precision": 0.8, "codec": OTHER, "floor": OTHER}
    scores = {
        "num_samples": 1000,
        "held_out": held_out,
        "spaces": {"efficientnet_lite0": space, "pixels": space | {"kid": None}},
        "cluster_share_tv": 0.1,
        "cluster_share_tv_floor": 0.05,
        "copies": {"share": 0.02, "expected": 0.01, "p_value": p_value},
        "calls_per_step": 1.0,
    }
    return ScoreRow(name=name, scores=scores, is_default=name == "sticky")


def test_clear_differences_are_ranked():
    rows = [score_row(name, 30.0 + 10 * number, float(number), 1.0 / 4) for number, name in enumerate(NAMES)]
    assert rank_rows(rows).ranks == dict(zip(NAMES, (1, 2, 3), strict=True))


@pytest.mark.parametrize("kid", [1.0, 0.0])
def test_gain_in_one_score_alone_is_no_gain(kid):
    ranking = rank_rows([score_row("monolith", 30, kid, 0.1), score_row("sticky", 60, 0.0, 0.1)])
    assert ranking.ranks == {} and ranking.reason.startswith("No difference seen at 1,000 samples; more with scores.")


def test_large_error_ranks_nothing():
    assert rank_rows([score_row("monolith", 30, 11.98, 22.83), score_row("sticky", 60, 30.0, 22.83)]).ranks == {}


def test_few_held_out_images_rank_nothing():
    rows = [score_row(name, 30.0 + 10 * number, float(number), 0.01, held_out=499) for number, name in enumerate(NAMES)]
    assert rank_rows(rows).ranks == {} and "499 held-out images, and a ranking needs 500" in rank_rows(rows).reason


def test_spaces_that_break_the_law_rank_nothing():
    rows = [score_row("monolith", 30, 0, 0.1), score_row("sticky", 60, 1, 0.1)]
    for row in rows:
        del row.scores["spaces"]["efficientnet_lite0"]
    assert rank_rows(rows).ranks == {} and "set scores.spaces=[efficientnet_lite0,pixels]" in rank_rows(rows).reason


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100), st.floats(0, 10)), min_size=2, max_size=3))
def test_ranks_follow_the_distances(values):
    rows = [score_row(name, *value) for name, value in zip(NAMES, values, strict=False)]
    ranks = rank_rows(rows).ranks
    for row in rows:
        for other in rows:
            ours, theirs = row.scores["spaces"]["efficientnet_lite0"], other.scores["spaces"]["efficientnet_lite0"]
            if ranks and ours["fd"] < theirs["fd"] - 30 and ours["kid"] < theirs["kid"] - 30:
                assert ranks[row.name] <= ranks[other.name]
    assert not ranks or min(ranks.values()) == 1 < max(ranks.values())


@pytest.mark.parametrize(("precision", "is_above"), [(0.80, False), (0.82, False), (0.90, True)])
def test_precision_above_its_floor_is_blur(precision, is_above):
    assert is_blurred({"precision": precision, "floor": {"precision": 0.8}}, 1000) == is_above


def test_table_has_codec_and_real_rows_and_excesses():
    rows = [score_row(name, 30.0 + 10 * n, 0.1 * n, 0.001, p_value=1e-6) for n, name in enumerate(NAMES)]
    text = io.StringIO()
    Console(file=text, width=80, color_system=None).print(score_table(rows))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for label in ("monolith", "sticky *", "full_then_sticky_0.5", "codec alone", "real images"):
        assert any(line.strip().startswith(label) for line in lines), label
    assert "+10" in text.getvalue() and "near copies" in text.getvalue() and "2.0 %" in text.getvalue()
