"""The search for a compression within a budget, and the Pareto front."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from orchestrator.cli.compress import (
    CANDIDATES,
    CompressionBudget,
    UnsuitableCompression,
    plan_search,
    search_candidates,
    with_compression,
)
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.errors import ConfigError
from orchestrator.reporting.pareto import CompressionPoint, pareto_front
from orchestrator.run.run_folder import RunFolder

POINT = CompressionPoint(name="x", folder=Path("x"), bytes=1.0, flops=1.0, memory=1.0, l2=0.0, cpu=1.0, kid=1.0, fd=1.0)


@pytest.mark.parametrize("text", ["", "bytes", "bytes<0.2", "weight<=1", "bytes<=1.2.3", "bytes<=0.2;kid<=1"])
def test_budget_invalid_text_lists_measures(text):
    with pytest.raises(ConfigError, match=r"bytes<=0\.25,kid<=1\.05, with bytes, flops, memory, cpu, kid, fd, l2"):
        CompressionBudget.parse(text)


def test_candidates_change_the_configuration():
    for overrides in CANDIDATES:
        assert with_compression(RunConfig(), overrides) != RunConfig()


def scripted_search(points):
    """Return a `compress` that returns the points in turn, an `on_result`, and the list of its violations."""
    remaining, results = iter(points), []

    def compress(overrides):
        point = next(remaining)
        if point is None:
            raise UnsuitableCompression("no")
        return point

    return compress, lambda overrides, point, violations: results.append(violations), results


def test_search_returns_first_candidate_within_budget():
    budget = CompressionBudget.parse("bytes<=0.25, kid<=1.05")
    light = replace(POINT, bytes=0.2)
    compress, on_result, results = scripted_search(
        [replace(POINT, bytes=0.3), None, replace(light, kid=1.2), light, POINT]
    )
    assert search_candidates(budget, compress, on_result) is light
    assert [len(violations) for violations in results] == [1, 1, 0]


def test_search_without_success_names_nearest_candidate():
    budget = CompressionBudget.parse("bytes<=0.25,cpu<=2")
    points = [replace(POINT, name="far"), replace(POINT, name="near", bytes=0.26), replace(POINT, cpu=None, bytes=0.1)]
    compress, on_result, _ = scripted_search([*points, *[None] * len(CANDIDATES)])
    with pytest.raises(ConfigError, match=r"none of the 3 .* nearest is near: bytes must be at most 0\.25; got 0\.260"):
        search_candidates(budget, compress, on_result)


def test_budget_out_of_reach_is_refused_before_any_work(tmp_path):
    config, folder = parse_config(compose(["experiment=digits"])), RunFolder(tmp_path / "run")
    for text, least in (("bytes<=0.01", "bytes 0.03"), ("flops<=0.001,kid<=2", "flops 0.0")):
        with pytest.raises(ConfigError, match=f"nothing was run; the least are .*{least}"):
            plan_search(CompressionBudget.parse(text), folder, config, Console(quiet=True))
    assert not folder.root.exists()


def test_plan_of_a_search_lists_what_may_be_within_the_budget(tmp_path):
    config, output = parse_config(compose(["experiment=digits"])), io.StringIO()
    console = Console(file=output, width=200)
    kept = plan_search(CompressionBudget.parse("flops<=0.1"), RunFolder(tmp_path / "run"), config, console)
    assert kept == [overrides for overrides in CANDIDATES if overrides[0] == "distill=sid"]
    assert all(" ".join(overrides) in output.getvalue() for overrides in kept) and "stages" in output.getvalue()


@given(costs=st.lists(st.tuples(*[st.integers(1, 5)] * 3), min_size=1, max_size=12))
def test_pareto_front_keeps_undominated_points(costs):
    points = [replace(POINT, bytes=float(a), cpu=float(b), kid=float(c)) for a, b, c in costs]
    front = pareto_front(points)
    assert front
    for point, cost in zip(points, costs, strict=True):
        is_beaten = any(other != cost and all(a <= b for a, b in zip(other, cost, strict=True)) for other in costs)
        assert (point in front) == (not is_beaten)
