"""Adaptive caching: the dynamic programme, and the bubbling union."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ensemble.compression.acceleration.adaptive_schedule import (
    bubbling_union,
    optimal_compute_steps,
    output_variation,
    similarity,
)


def value_of(found, steps):
    """The objective, by its definition."""
    last = [max(step for step in steps if step <= t) for t in range(len(found))]
    return sum(found[last[t], t] for t in range(len(found)))


@given(st.integers(2, 8), st.integers(0, 10**6), st.data())
def test_the_programme_finds_what_trying_all_finds(steps, seed, data):
    count = data.draw(st.integers(1, steps))
    found = np.random.default_rng(seed).normal(size=(steps, steps))
    tried = [(0, *rest) for rest in combinations(range(1, steps), count - 1)]
    best = max(value_of(found, chosen) for chosen in tried)
    chosen = optimal_compute_steps(found, count)
    assert chosen[0] == 0 and len(chosen) == count == len(set(chosen)) and list(chosen) == sorted(chosen)
    assert value_of(found, chosen) == pytest.approx(best)


def test_more_steps_than_there_are_is_refused():
    with pytest.raises(ValueError, match="of 3 steps, 1 to 3"):
        optimal_compute_steps(np.eye(3), 4)


def test_what_stays_the_same_is_similar_and_does_not_stir():
    said = torch.randn(1, 5, 7).expand(4, 5, 7)
    np.testing.assert_allclose(similarity(said), np.ones((4, 4)), atol=1e-12)
    assert output_variation(said) == 0
    other = torch.cat([said[:2], -said[2:]])
    assert similarity(other)[0, 2] == pytest.approx(-1) and output_variation(other) > 0


def test_when_one_that_changes_much_is_computed_the_feed_forward_layers_behind_it_are_too():
    updates = {"0.attn": (0, 3), "0.ff": (0, 1), "1.attn": (0, 4), "1.ff": (0, 2)}
    changes = {"0.attn": 1.0, "0.ff": 0.1, "1.attn": 5.0, "1.ff": 0.2}
    union = bubbling_union(updates, changes, 1, ["0.ff", "1.ff"])
    assert union == updates | {"1.ff": (0, 2, 4)}
    union = bubbling_union(updates, changes, 2, ["0.ff", "1.ff"])
    assert union == updates | {"0.ff": (0, 1, 3), "1.ff": (0, 2, 3, 4)}
    assert bubbling_union(updates, changes, 0, ["0.ff", "1.ff"]) == updates
