"""Features that are kept from one evaluation to the next."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from experts.compressed.caching.feature_cache import (
    CachedOutputs,
    FeatureCache,
    skip_cached_modules,
    taylor_extrapolate,
)
from experts.compressed.caching.plan import CacheSchedule

TIMES = (1.0, 0.75, 0.5, 0.25)


def plan(updates, order=0, costs=(1.0, 0.4, 0.4, 0.4)):
    return CacheSchedule(times=TIMES, compute_steps=updates, order=order, relative_flops=costs)


class Counting(nn.Module):
    """Says its input times two, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return 2 * x


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = Counting(), Counting()

    def forward(self, x):
        return self.outer(self.inner(x)) + x


@given(st.floats(-3, 3), st.floats(-3, 3), st.lists(st.integers(1, 4), min_size=1, max_size=2), st.integers(1, 5))
def test_what_changes_evenly_goes_on_exactly(start, slope, gaps, ahead):
    steps = [0]
    for gap in gaps:
        steps.append(steps[-1] + gap)
    kept = [(step, torch.tensor([start + slope * step])) for step in steps]
    at = steps[-1] + ahead
    torch.testing.assert_close(taylor_extrapolate(kept, at), torch.tensor([start + slope * at]), atol=1e-4, rtol=1e-4)


def test_a_higher_order_is_nearer_to_what_bends():
    said = [(step, torch.tensor([0.1 * step**2])) for step in (0, 2, 4)]
    exact = 0.1 * 5**2
    errors = [abs(float(taylor_extrapolate(said[-order - 1 :], 5)) - exact) for order in (0, 1, 2)]
    assert errors[2] < errors[1] < errors[0]


def test_tuples_are_kept_as_they_are():
    kept = [(0, (torch.ones(2), (torch.zeros(1),))), (1, (2 * torch.ones(2), (torch.ones(1),)))]
    first, (second,) = taylor_extrapolate(kept, 2)
    assert torch.equal(first, 3 * torch.ones(2)) and torch.equal(second, 2 * torch.ones(1))


def test_a_module_that_is_not_due_is_not_called_and_says_what_it_said():
    model, kept = Two(), CachedOutputs()
    for index, is_due in enumerate((True, False, True, False)):
        with skip_cached_modules(model, plan({"inner": (0, 2)}), index, kept):
            said = model(torch.full((1,), float(index)))
        last = index if is_due else index - 1
        assert float(said) == 4 * last + index
    assert model.inner.calls == 2 and model.outer.calls == 4
    assert "forward" not in vars(model.inner), "the module is as it was"


def test_samples_that_come_later_are_computed_whole_and_those_that_leave_take_nothing_along():
    model, features = Two(), FeatureCache()
    rows, work = torch.arange(4), []

    def ask(t, asked, values):
        said, calls = features.run(model, plan({"inner": (0,)}), t, asked, lambda places: model(values[places]))
        work.append(calls)
        return said

    ask(1.0, rows[:2], torch.tensor([1.0, 2.0]))
    said = ask(0.75, rows[[1, 3, 0]], torch.tensor([20.0, 30.0, 10.0]))
    assert said.tolist() == [4 * 2 + 20, 4 * 30 + 30, 4 * 1 + 10]
    assert work == pytest.approx([2, 0.4 + 1 + 0.4])
    said = ask(0.5, rows[[3]], torch.tensor([1.0]))
    assert said.tolist() == [4 * 30 + 1]
    assert [group.rows.tolist() for group in features.groups] == [[3]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"times": ()}, "falling times"),
        ({"times": (0.5, 0.5)}, "falling times"),
        ({"order": 3}, "order 0, 1 or 2"),
        ({"relative_flops": (1.0,)}, "need 4 costs"),
        ({"relative_flops": (1.0, 2.0, 1.0, 1.0)}, "from 0 to 1"),
        ({"compute_steps": {"inner": (4,)}}, "at some of the evaluations"),
    ],
)
def test_what_is_no_plan_is_refused(given, message):
    settings = {
        "times": TIMES,
        "compute_steps": {"inner": (0,)},
        "order": 0,
        "relative_flops": (1.0, 0.4, 0.4, 0.4),
    } | given
    with pytest.raises(ValueError, match=message):
        CacheSchedule(**settings)


def test_a_plan_knows_its_times_and_no_others_and_comes_back_from_json():
    made = plan({"inner": (0, 2)}, order=1)
    assert [made.index(t) for t in TIMES] == [0, 1, 2, 3] and made.index(0.5 + 1e-6) == 2
    with pytest.raises(ValueError, match="sample with as many steps"):
        made.index(0.6)
    assert CacheSchedule.parsed(made.described()) == made
