"""Who runs when: a schedule by hand, and what no schedule may break."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.compute import ComputeConfig, IslandConfig, ResourcesConfig, StagesConfig
from orchestrator.errors import ConfigError
from orchestrator.pipeline.stage import Input, Stage
from orchestrator.planning.simulate import PlannedExecution, critical_path, simulate_run


def island(cpus=1, price=0.0) -> IslandConfig:
    return IslandConfig(address="http://127.0.1.1:8265", token_file="t", storage="/s", cpus=cpus, price_per_hour=price)


def stage(name, kind="expert", inputs=(), **asked) -> Stage:
    given = {before.name: Input(stage=before) for before in inputs}
    return Stage(name=name, kind=kind, config=name, inputs=given, resources=ResourcesConfig(**asked))


def visits(graph, compute, lasting, start_s=None, finished=()) -> dict[str, PlannedExecution]:
    found = simulate_run(graph, finished, compute, lambda stage, place: lasting[stage.name], start_s or {})
    return {visit.stage: visit for visit in found}


HOME_OF_TWO = ComputeConfig(cpus=2)
INLINE = ComputeConfig(backend="inline")


def test_two_islands_by_hand():
    """data at home for 1 s; three experts of 4, 3, 2 s on two islands of one CPU; the ensemble waits for all."""
    data = stage("data", "dataset")
    experts = [stage(f"expert_{k}", inputs=[data]) for k in range(3)]
    ensemble = stage("ensemble", "ensemble", inputs=experts)
    compute = ComputeConfig(backend="islands", cpus=1, islands={"a": island(), "b": island(price=1.0)})
    lasting = {"data": 1.0, "expert_0": 4.0, "expert_1": 3.0, "expert_2": 2.0, "ensemble": 1.0}
    found = visits([data, *experts, ensemble], compute, lasting)
    places = {name: (visit.place, visit.starts_s, visit.ends_s) for name, visit in found.items()}
    assert places == {
        "data": ("controller", 0.0, 1.0),
        "expert_0": ("a", 1.0, 5.0),
        "expert_1": ("b", 1.0, 4.0),
        "expert_2": ("b", 4.0, 6.0),
        "ensemble": ("controller", 6.0, 7.0),
    }


def test_home_holds_no_more_than_its_cpus():
    graph = [stage(str(k), "dataset", cpus=1 + (k == 0)) for k in range(3)]
    found = visits(graph, HOME_OF_TWO, dict.fromkeys("012", 5.0))
    assert [found[name].starts_s for name in "012"] == [0.0, 5.0, 5.0]


def test_inline_runs_one_after_the_other():
    found = visits([stage(str(k)) for k in range(3)], INLINE, dict.fromkeys("012", 2.0))
    assert sorted(visit.ends_s for visit in found.values()) == [2.0, 4.0, 6.0]


def test_a_process_is_started_once_at_home_and_for_every_stage_on_an_island():
    graph = [stage(str(k)) for k in range(3)]
    at_home = visits(graph, INLINE, dict.fromkeys("012", 1.0), {"controller": 10.0})
    assert max(visit.ends_s for visit in at_home.values()) == 13.0
    islands = ComputeConfig(backend="islands", islands={"a": island()})
    assert max(visit.ends_s for visit in visits(graph, islands, dict.fromkeys("012", 1.0), {"a": 10.0}).values()) == 33


def test_what_is_finished_takes_no_time():
    data = stage("data", "dataset")
    found = visits([data, stage("expert", inputs=[data])], INLINE, {"expert": 2.0}, finished={"data"})
    assert list(found) == ["expert"] and found["expert"].starts_s == 0.0
    found = visits([data, stage("expert", inputs=[data])], INLINE, {"data": 2.0}, finished={"expert"})
    assert list(found) == ["data"]


def test_what_fits_nowhere_is_refused():
    with pytest.raises(ConfigError, match="compute.stages"):
        visits([stage("big", "dataset", cpus=3)], HOME_OF_TWO, {"big": 1.0})
    islands = ComputeConfig(backend="islands", islands={"a": island()})
    with pytest.raises(ConfigError, match="no island is that large"):
        visits([stage("big", cpus=3)], islands, {"big": 1.0})


def test_stages_go_where_they_are_told():
    stages = StagesConfig(expert=ResourcesConfig(islands=("b",)))
    compute = ComputeConfig(backend="islands", islands={"a": island(), "b": island()}, stages=stages)
    found = visits([stage("x", islands=("b",)), stage("y", islands=("b",))], compute, {"x": 1.0, "y": 1.0})
    assert [visit.place for visit in found.values()] == ["b", "b"]


@st.composite
def graphs(draw):
    """Up to twelve stages that wait for some of those before them, with how long each lasts."""
    graph: list[Stage] = []
    for number in range(draw(st.integers(1, 12))):
        before = draw(st.lists(st.sampled_from(graph), unique_by=id, max_size=3)) if graph else []
        graph.append(stage(f"s{number}", inputs=before))
    lasting = {one.name: draw(st.floats(0.1, 10.0)) for one in graph}
    return graph, lasting


@given(graphs(), st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_list_scheduling_keeps_its_promises(drawn, sizes):
    graph, lasting = drawn
    islands = {f"i{number}": island(cpus=size) for number, size in enumerate(sizes)}
    found = visits(graph, ComputeConfig(backend="islands", islands=islands), lasting)
    makespan, capacity = max(visit.ends_s for visit in found.values()), sum(sizes)
    longest, work = critical_path(graph, (), lasting), sum(lasting.values())
    assert makespan >= longest - 1e-9 and makespan >= work / capacity - 1e-9
    assert makespan <= work / capacity + (1 - 1 / capacity) * longest + 1e-9  # Graham 1969, theorem 1
    for one in graph:
        assert all(found[given.stage.name].ends_s <= found[one.name].starts_s for given in one.inputs.values())
    for name, config in islands.items():
        here = [visit for visit in found.values() if visit.place == name]
        for moment in (visit.starts_s for visit in here):
            assert sum(visit.starts_s <= moment < visit.ends_s for visit in here) <= config.cpus


def test_the_longest_chain():
    data = stage("data")
    graph = [data, stage("short", inputs=[data]), stage("long", inputs=[data])]
    lasting = {"data": 1.0, "short": 2.0, "long": 5.0}
    assert critical_path(graph, (), lasting) == 6.0
    assert critical_path(graph, {"data"}, lasting) == 5.0
    assert critical_path([], (), {}) == 0.0


def test_a_slurm_queue_is_taken_to_be_endless():
    compute = ComputeConfig(backend="slurm")
    found = visits(
        [stage(str(k), cpus=64) for k in range(9)], compute, {str(k): 1.0 for k in range(9)}, {"controller": 3.0}
    )
    assert {(visit.starts_s, visit.ends_s) for visit in found.values()} == {(0.0, 4.0)}
