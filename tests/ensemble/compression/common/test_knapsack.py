"""The knapsack against all sets there are."""

from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble.compression.common.knapsack import knapsack

ITEMS = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 40)), min_size=1, max_size=9)


@given(items=ITEMS, share=st.floats(0.01, 1))
def test_it_finds_what_trying_all_sets_finds(items, share):
    costs, sizes = [float(cost) for cost, _ in items], [size for _, size in items]
    target = max(1, round(share * sum(sizes)))
    chosen = knapsack(costs, sizes, target)
    everything = chain.from_iterable(combinations(range(len(items)), count) for count in range(len(items) + 1))
    best = min(sum(costs[i] for i in picked) for picked in everything if sum(sizes[i] for i in picked) >= target)
    assert sum(sizes[i] for i in chosen) >= target
    assert sum(costs[i] for i in chosen) == best


@given(items=ITEMS, share=st.floats(0.01, 1))
def test_with_few_buckets_it_is_still_enough(items, share):
    costs, sizes = [float(cost) for cost, _ in items], [1000 * size + 7 for _, size in items]
    target = max(1, round(share * sum(sizes)))
    assert sum(sizes[i] for i in knapsack(costs, sizes, target, buckets=5)) >= target


def test_too_much_is_refused():
    with pytest.raises(ValueError, match="ask for fewer"):
        knapsack([1.0], [3], 4)
