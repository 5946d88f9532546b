"""One option of every item: never over the budget, and as good as the best but for one step."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble.compression.common.knapsack import Option, choose_options

OPTIONS = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 100)), min_size=1, max_size=4)
ITEMS = st.lists(OPTIONS, min_size=1, max_size=4).map(
    lambda items: [[Option(size=size, cost=float(cost)) for size, cost in options] for options in items]
)


def worth(items, chosen):
    taken = [options[index] for options, index in zip(items, chosen, strict=True)]
    return sum(option.size for option in taken), sum(option.cost for option in taken)


def best(items, budget):
    """The least cost within the budget, by trying everything."""
    found = (worth(items, chosen) for chosen in itertools.product(*(range(len(options)) for options in items)))
    return min(cost for size, cost in found if size <= budget)


@settings(deadline=None, max_examples=200)
@given(items=ITEMS, more=st.integers(0, 60))
def test_it_is_within_the_budget_and_within_one_step_of_the_best(items, more):
    budget = sum(min(option.size for option in options) for options in items) + more
    size, cost = worth(items, choose_options(items, budget))
    steps = [a.cost - b.cost for options in items for a, b in itertools.permutations(options, 2)]
    assert size <= budget
    assert best(items, budget) <= cost <= best(items, budget) + max([0.0, *steps])


@settings(deadline=None)
@given(items=ITEMS)
def test_with_room_for_everything_the_cheapest_is_taken(items):
    budget = sum(max(option.size for option in options) for options in items)
    assert worth(items, choose_options(items, budget))[1] == best(items, budget)


def test_where_a_byte_saves_most_it_is_spent_first():
    items = [
        [Option(size=size, cost=cost) for size, cost in ((1, 100.0), (2, 10.0), (3, 1.0))],
        [Option(size=size, cost=cost) for size, cost in ((1, 5.0), (2, 4.0), (3, 0.0))],
    ]
    assert [choose_options(items, budget) for budget in (2, 3, 4, 6)] == [[0, 0], [1, 0], [2, 0], [2, 2]]


def test_a_budget_that_nothing_fits_into_is_refused():
    with pytest.raises(ValueError, match="smallest options take 3"):
        choose_options([[Option(size=3, cost=1.0)]], 2)
    with pytest.raises(ValueError, match="leave it out"):
        choose_options([[]], 2)
