"""Suggestions for a folder: scores can be ranked where the images suffice."""

from hypothesis import given
from hypothesis import strategies as st

from ensemble.evaluation.spaces import MIN_RANKED_HELD_OUT
from orchestrator.planning.checks.suggest import MAX_HOLDOUT, suggest_holdout


@given(st.integers(1, 10**7))
def test_held_out_images_suffice_for_a_ranking_where_they_can(images):
    share = suggest_holdout(images).value
    assert 0.1 <= share <= MAX_HOLDOUT
    assert share * images >= MIN_RANKED_HELD_OUT - 1e-6 or images * MAX_HOLDOUT < MIN_RANKED_HELD_OUT
