"""Both knapsacks against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble.compression.common.knapsack import Option, choose_items, choose_options

ITEMS = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 40)), min_size=1, max_size=9)
OPTIONS = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 100)), min_size=1, max_size=4)
OPTION_LISTS = st.lists(OPTIONS, min_size=1, max_size=4).map(
    lambda items: [[Option(size=size, cost=float(cost)) for size, cost in options] for options in items]
)


def least_cost(costs, sizes, target):
    """Return the least cost of any subset that is large enough."""
    count = len(costs)
    subsets = itertools.chain.from_iterable(itertools.combinations(range(count), length) for length in range(count + 1))
    return min(sum(costs[i] for i in subset) for subset in subsets if sum(sizes[i] for i in subset) >= target)


def totals(items, chosen):
    """Return the total size and the total cost of the chosen options."""
    options = [options[index] for options, index in zip(items, chosen, strict=True)]
    return sum(option.size for option in options), sum(option.cost for option in options)


def least_option_cost(items, budget):
    """Return the least cost within the budget, over all combinations of options."""
    combinations = itertools.product(*(range(len(options)) for options in items))
    return min(cost for size, cost in (totals(items, chosen) for chosen in combinations) if size <= budget)


@settings(deadline=None)
@given(items=ITEMS, share=st.floats(0.01, 1))
def test_chosen_items_cost_as_little_as_brute_force(items, share):
    costs, sizes = [float(cost) for cost, _ in items], [size for _, size in items]
    target = max(1, round(share * sum(sizes)))
    chosen = choose_items(costs, sizes, target)
    assert sum(sizes[i] for i in chosen) >= target
    assert sum(costs[i] for i in chosen) == least_cost(costs, sizes, target)


@settings(deadline=None)
@given(items=ITEMS, share=st.floats(0.01, 1))
def test_large_sizes_never_fall_short_of_the_target(items, share):
    costs, sizes = [float(cost) for cost, _ in items], [100_000 * size + 7 for _, size in items]
    target = max(1, round(share * sum(sizes)))
    chosen = choose_items(costs, sizes, target)
    assert sum(sizes[i] for i in chosen) >= target
    assert sum(costs[i] for i in chosen) == least_cost(costs, sizes, target)


@settings(deadline=None, max_examples=200)
@given(items=ITEMS, share=st.floats(0.01, 1), draws=st.data())
def test_sizes_of_sets_count_once_all_of_the_set_is_chosen(items, share, draws):
    costs, sizes = [float(cost) for cost, _ in items], [size for _, size in items]
    sets = st.frozensets(st.integers(0, len(items) - 1), min_size=1, max_size=3)
    joint = draws.draw(st.dictionaries(sets, st.integers(0, 40), max_size=4))

    def size_of(chosen):
        return sum(sizes[i] for i in chosen) + sum(size for items, size in joint.items() if items <= set(chosen))

    everything = range(len(items))
    target = max(1, round(share * size_of(everything)))
    subsets = (subset for length in range(len(items) + 1) for subset in itertools.combinations(everything, length))
    least = min(sum(costs[i] for i in subset) for subset in subsets if size_of(subset) >= target)
    chosen = choose_items(costs, sizes, target, joint)
    assert size_of(chosen) >= target and sum(costs[i] for i in chosen) == least


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_costs_of_any_scale_are_solved_exactly(scale):
    for seed in range(20):
        generator = np.random.default_rng(seed)
        costs = (scale * np.exp(generator.normal(0, 3, 10))).tolist()
        sizes = generator.integers(1_000, 10**7, 10).tolist()
        target = int(generator.uniform(0.1, 0.9) * sum(sizes))
        chosen = choose_items(costs, sizes, target)
        assert sum(sizes[i] for i in chosen) >= target
        assert sum(costs[i] for i in chosen) == pytest.approx(least_cost(costs, sizes, target), rel=1e-9)


def test_equal_inputs_give_the_same_choice_among_ties():
    assert len({tuple(choose_items([1.0] * 12, [5] * 12, 30)) for _ in range(5)}) == 1
    equal_items = [[Option(size=1, cost=2.0), Option(size=2, cost=1.0)]] * 6
    assert len({tuple(choose_options(equal_items, 9)) for _ in range(5)}) == 1


def test_a_target_above_all_sizes_is_an_error():
    with pytest.raises(ValueError, match="lower the target"):
        choose_items([1.0], [3], 4)


@settings(deadline=None, max_examples=200)
@given(items=OPTION_LISTS, spare=st.integers(0, 60))
def test_chosen_options_cost_as_little_as_brute_force(items, spare):
    budget = sum(min(option.size for option in options) for options in items) + spare
    size, cost = totals(items, choose_options(items, budget))
    assert size <= budget
    assert cost == least_option_cost(items, budget)


@settings(deadline=None)
@given(items=OPTION_LISTS)
def test_a_budget_for_everything_takes_the_cheapest_options(items):
    budget = sum(max(option.size for option in options) for options in items)
    assert totals(items, choose_options(items, budget))[1] == least_option_cost(items, budget)


def test_bytes_are_spent_where_they_save_most():
    items = [
        [Option(size=size, cost=cost) for size, cost in ((1, 100.0), (2, 10.0), (3, 1.0))],
        [Option(size=size, cost=cost) for size, cost in ((1, 5.0), (2, 4.0), (3, 0.0))],
    ]
    assert [choose_options(items, budget) for budget in (2, 3, 4, 6)] == [[0, 0], [1, 0], [2, 0], [2, 2]]


def test_a_budget_below_the_smallest_options_is_an_error():
    with pytest.raises(ValueError, match="smallest options take 3"):
        choose_options([[Option(size=3, cost=1.0)]], 2)
    with pytest.raises(ValueError, match="leave it out"):
        choose_options([[]], 2)
