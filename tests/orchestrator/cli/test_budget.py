"""The search for a compression within a budget, and the points that it and the report see."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli.compress import CANDIDATES, CompressionBudget, UnsuitableCompression, search, with_compression
from orchestrator.config.schema import RunConfig
from orchestrator.errors import ConfigError
from orchestrator.reporting.pareto import CompressionPoint, front_of

POINT = CompressionPoint(name="x", folder=Path("x"), bytes=1.0, flops=1.0, l2=0.0, cpu=1.0, kid=1.0, fd=1.0)


@pytest.mark.parametrize("text", ["", "bytes", "bytes<0.2", "weight<=1", "bytes<=1.2.3", "bytes<=0.2;kid<=1"])
def test_what_is_no_budget_says_what_is(text):
    with pytest.raises(ConfigError, match=r"bytes<=0\.25,kid<=1\.05, with bytes, flops, cpu, kid, fd, l2"):
        CompressionBudget.parsed(text)


def test_every_candidate_is_a_compression():
    for overrides in CANDIDATES:
        assert with_compression(RunConfig(), overrides) != RunConfig()


def tries(points):
    remaining, said = iter(points), []

    def make(overrides):
        point = next(remaining)
        if point is None:
            raise UnsuitableCompression("no")
        return point

    return make, lambda overrides, point, broken: said.append(broken), said


def test_the_first_that_keeps_to_the_budget_is_taken_and_what_does_not_fit_is_left_out():
    budget = CompressionBudget.parsed("bytes<=0.25, kid<=1.05")
    light = replace(POINT, bytes=0.2)
    make, say, said = tries([replace(POINT, bytes=0.3), None, replace(light, kid=1.2), light, POINT])
    assert search(budget, make, say) is light
    assert [len(broken) for broken in said] == [1, 1, 0]


def test_with_none_within_the_nearest_is_named_and_a_missing_figure_is_not_within():
    budget = CompressionBudget.parsed("bytes<=0.25,cpu<=2")
    points = [replace(POINT, name="far"), replace(POINT, name="near", bytes=0.26), replace(POINT, cpu=None, bytes=0.1)]
    make, say, _ = tries([*points, *[None] * len(CANDIDATES)])
    with pytest.raises(ConfigError, match=r"none of the 3 .* nearest is near: bytes is 0\.260, at most 0\.25"):
        search(budget, make, say)


@given(costs=st.lists(st.tuples(*[st.integers(1, 5)] * 3), min_size=1, max_size=12))
def test_the_front_is_what_no_other_beats(costs):
    points = [replace(POINT, bytes=float(a), cpu=float(b), kid=float(c)) for a, b, c in costs]
    front = front_of(points)
    assert front
    for point, cost in zip(points, costs, strict=True):
        is_beaten = any(other != cost and all(a <= b for a, b in zip(other, cost, strict=True)) for other in costs)
        assert (point in front) == (not is_beaten)
