"""Feature caches and their schedules."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ddm_core.artifacts import to_json
from ddm_core.json_values import from_json
from experts.compressed.caching.feature_cache import (
    CachedOutputs,
    FeatureCache,
    skip_cached_modules,
    taylor_extrapolate,
)
from experts.compressed.caching.plan import CacheSchedule

TIMES = (1.0, 0.75, 0.5, 0.25)


def create_schedule(compute_steps, order=0, costs=(1.0, 0.4, 0.4, 0.4)):
    return CacheSchedule(times=TIMES, compute_steps=compute_steps, order=order, relative_flops=costs)


class Counting(nn.Module):
    """Returns twice its input, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return 2 * x


class TwoModules(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = Counting(), Counting()

    def forward(self, x):
        return self.outer(self.inner(x)) + x


@given(st.floats(-3, 3), st.floats(-3, 3), st.lists(st.integers(1, 4), min_size=1, max_size=2), st.integers(1, 5))
def test_linear_features_are_extrapolated_exactly(start, slope, gaps, ahead):
    steps = [0]
    for gap in gaps:
        steps.append(steps[-1] + gap)
    outputs = [(step, torch.tensor([start + slope * step])) for step in steps]
    target = steps[-1] + ahead
    expected = torch.tensor([start + slope * target])
    torch.testing.assert_close(taylor_extrapolate(outputs, target), expected, atol=1e-4, rtol=1e-4)


def test_higher_order_reduces_extrapolation_error():
    outputs = [(step, torch.tensor([0.1 * step**2])) for step in (0, 2, 4)]
    exact = 0.1 * 5**2
    errors = [abs(float(taylor_extrapolate(outputs[-order - 1 :], 5)) - exact) for order in (0, 1, 2)]
    assert errors[2] < errors[1] < errors[0]


def test_tuple_outputs_are_extrapolated_per_element():
    outputs = [(0, (torch.ones(2), (torch.zeros(1),))), (1, (2 * torch.ones(2), (torch.ones(1),)))]
    first, (second,) = taylor_extrapolate(outputs, 2)
    assert torch.equal(first, 3 * torch.ones(2)) and torch.equal(second, 2 * torch.ones(1))


def test_skipped_module_returns_its_cached_output():
    model, outputs = TwoModules(), CachedOutputs()
    for index, is_due in enumerate((True, False, True, False)):
        with skip_cached_modules(model, create_schedule({"inner": (0, 2)}), index, outputs):
            output = model(torch.full((1,), float(index)))
        computed = index if is_due else index - 1
        assert float(output) == 4 * computed + index
    assert model.inner.calls == 2 and model.outer.calls == 4
    assert "forward" not in vars(model.inner), "the module is restored"


def test_new_rows_are_computed_and_absent_rows_dropped():
    model, features = TwoModules(), FeatureCache()
    rows, work = torch.arange(4), []

    def evaluate(t, called_rows, values):
        schedule = create_schedule({"inner": (0,)})
        result, calls = features.run(model, schedule, t, called_rows, lambda positions: model(values[positions]))
        work.append(calls)
        return result

    evaluate(1.0, rows[:2], torch.tensor([1.0, 2.0]))
    output = evaluate(0.75, rows[[1, 3, 0]], torch.tensor([20.0, 30.0, 10.0]))
    assert output.tolist() == [4 * 2 + 20, 4 * 30 + 30, 4 * 1 + 10]
    assert work == pytest.approx([2, 0.4 + 1 + 0.4])
    output = evaluate(0.5, rows[[3]], torch.tensor([1.0]))
    assert output.tolist() == [4 * 30 + 1]
    assert [group.rows.tolist() for group in features.groups] == [[3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"times": ()}, "falling times"),
        ({"times": (0.5, 0.5)}, "falling times"),
        ({"order": 3}, "order must be 0, 1 or 2"),
        ({"relative_flops": (1.0,)}, "need 4 costs"),
        ({"relative_flops": (1.0, 2.0, 1.0, 1.0)}, "from 0 to 1"),
        ({"compute_steps": {"inner": (4,)}}, "compute steps must be from 0 to 3"),
    ],
)
def test_invalid_schedule_is_refused(change, message):
    settings = {
        "times": TIMES,
        "compute_steps": {"inner": (0,)},
        "order": 0,
        "relative_flops": (1.0, 0.4, 0.4, 0.4),
    } | change
    with pytest.raises(ValueError, match=message):
        CacheSchedule(**settings)


def test_schedule_finds_its_times_and_survives_json():
    schedule = create_schedule({"inner": (0, 2)}, order=1)
    assert [schedule.index(t) for t in TIMES] == [0, 1, 2, 3] and schedule.index(0.5 + 1e-6) == 2
    with pytest.raises(ValueError, match="sample with as many steps"):
        schedule.index(0.6)
    assert from_json(CacheSchedule, json.loads(to_json(schedule))) == schedule
