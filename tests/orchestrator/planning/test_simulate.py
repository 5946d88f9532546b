"""Simulated runs: schedules calculated by hand, and invariants of every schedule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.config.compute import ComputeConfig, IslandConfig, ResourcesConfig, StagesConfig
from orchestrator.errors import ConfigError
from orchestrator.pipeline.stage import Input, Stage
from orchestrator.planning.simulate import PlannedExecution, critical_path, simulate_run


def island(cpus=1, price=0.0) -> IslandConfig:
    return IslandConfig(address="http://127.0.1.1:8265", token_file="t", storage="/s", cpus=cpus, price_per_hour=price)


def stage(name, kind="expert", inputs=(), **resources) -> Stage:
    artifacts = {source.name: Input(stage=source) for source in inputs}
    return Stage(name=name, kind=kind, config=name, inputs=artifacts, resources=ResourcesConfig(**resources))


def simulate(graph, compute, durations, start_s=None, finished=()) -> dict[str, PlannedExecution]:
    executions = simulate_run(graph, finished, compute, lambda stage, place: durations[stage.name], start_s or {})
    return {execution.stage: execution for execution in executions}


TWO_CPUS = ComputeConfig(cpus=2)
INLINE = ComputeConfig(backend="inline")


def test_two_islands_equal_hand_calculation():
    """Data takes 1 s; three experts of 4, 3, 2 s share two islands of one CPU; the ensemble needs all."""
    data = stage("data", "dataset")
    experts = [stage(f"expert_{k}", inputs=[data]) for k in range(3)]
    ensemble = stage("ensemble", "ensemble", inputs=experts)
    compute = ComputeConfig(backend="islands", cpus=1, islands={"a": island(), "b": island(price=1.0)})
    durations = {"data": 1.0, "expert_0": 4.0, "expert_1": 3.0, "expert_2": 2.0, "ensemble": 1.0}
    executions = simulate([data, *experts, ensemble], compute, durations)
    places = {name: (execution.place, execution.starts_s, execution.ends_s) for name, execution in executions.items()}
    assert places == {
        "data": ("controller", 0.0, 1.0),
        "expert_0": ("a", 1.0, 5.0),
        "expert_1": ("b", 1.0, 4.0),
        "expert_2": ("b", 4.0, 6.0),
        "ensemble": ("controller", 6.0, 7.0),
    }


def test_controller_uses_no_more_than_its_cpus():
    graph = [stage(str(k), "dataset", cpus=1 + (k == 0)) for k in range(3)]
    executions = simulate(graph, TWO_CPUS, dict.fromkeys("012", 5.0))
    assert [executions[name].starts_s for name in "012"] == [0.0, 5.0, 5.0]


def test_inline_runs_stages_sequentially():
    executions = simulate([stage(str(k)) for k in range(3)], INLINE, dict.fromkeys("012", 2.0))
    assert sorted(execution.ends_s for execution in executions.values()) == [2.0, 4.0, 6.0]


def test_only_islands_start_a_process_per_stage():
    graph = [stage(str(k)) for k in range(3)]
    at_controller = simulate(graph, INLINE, dict.fromkeys("012", 1.0), {"controller": 10.0})
    assert max(execution.ends_s for execution in at_controller.values()) == 13.0
    islands = ComputeConfig(backend="islands", islands={"a": island()})
    assert (
        max(execution.ends_s for execution in simulate(graph, islands, dict.fromkeys("012", 1.0), {"a": 10.0}).values())
        == 33
    )


def test_finished_stages_take_no_time():
    data = stage("data", "dataset")
    executions = simulate([data, stage("expert", inputs=[data])], INLINE, {"expert": 2.0}, finished={"data"})
    assert list(executions) == ["expert"] and executions["expert"].starts_s == 0.0
    executions = simulate([data, stage("expert", inputs=[data])], INLINE, {"data": 2.0}, finished={"expert"})
    assert list(executions) == ["data"]


def test_stage_that_fits_nowhere_is_rejected():
    with pytest.raises(ConfigError, match="compute.stages"):
        simulate([stage("big", "dataset", cpus=3)], TWO_CPUS, {"big": 1.0})
    islands = ComputeConfig(backend="islands", islands={"a": island()})
    with pytest.raises(ConfigError, match="no island is that large"):
        simulate([stage("big", cpus=3)], islands, {"big": 1.0})


def test_stages_run_on_their_configured_islands():
    stages = StagesConfig(expert=ResourcesConfig(islands=("b",)))
    compute = ComputeConfig(backend="islands", islands={"a": island(), "b": island()}, stages=stages)
    executions = simulate([stage("x", islands=("b",)), stage("y", islands=("b",))], compute, {"x": 1.0, "y": 1.0})
    assert [execution.place for execution in executions.values()] == ["b", "b"]


@st.composite
def graphs(draw):
    """Generate up to twelve stages that depend on some earlier ones, with their durations."""
    graph: list[Stage] = []
    for number in range(draw(st.integers(1, 12))):
        inputs = draw(st.lists(st.sampled_from(graph), unique_by=id, max_size=3)) if graph else []
        graph.append(stage(f"s{number}", inputs=inputs))
    durations = {node.name: draw(st.floats(0.1, 10.0)) for node in graph}
    return graph, durations


@given(graphs(), st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_schedule_satisfies_bounds_and_capacities(drawn_graph, sizes):
    graph, durations = drawn_graph
    islands = {f"i{number}": island(cpus=size) for number, size in enumerate(sizes)}
    executions = simulate(graph, ComputeConfig(backend="islands", islands=islands), durations)
    makespan, capacity = max(execution.ends_s for execution in executions.values()), sum(sizes)
    longest, work = critical_path(graph, (), durations), sum(durations.values())
    assert makespan >= longest - 1e-9 and makespan >= work / capacity - 1e-9
    assert makespan <= work / capacity + (1 - 1 / capacity) * longest + 1e-9  # Graham 1969, theorem 1
    for node in graph:
        sources = [artifact.stage.name for artifact in node.inputs.values()]
        assert all(executions[source].ends_s <= executions[node.name].starts_s for source in sources)
    for name, config in islands.items():
        local = [execution for execution in executions.values() if execution.place == name]
        for moment in (execution.starts_s for execution in local):
            assert sum(execution.starts_s <= moment < execution.ends_s for execution in local) <= config.cpus


def test_critical_path_is_the_longest_chain():
    data = stage("data")
    graph = [data, stage("short", inputs=[data]), stage("long", inputs=[data])]
    durations = {"data": 1.0, "short": 2.0, "long": 5.0}
    assert critical_path(graph, (), durations) == 6.0
    assert critical_path(graph, {"data"}, durations) == 5.0
    assert critical_path([], (), {}) == 0.0


def test_slurm_queue_counts_as_unlimited():
    compute = ComputeConfig(backend="slurm")
    executions = simulate(
        [stage(str(k), cpus=64) for k in range(9)], compute, {str(k): 1.0 for k in range(9)}, {"controller": 3.0}
    )
    assert {(execution.starts_s, execution.ends_s) for execution in executions.values()} == {(0.0, 4.0)}
