"""The plan of a small run on two islands, from speeds that are easy to reckon with."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from data_partition.config import DataConfig, PartitionConfig
from ddm_core.artifacts import publish, to_jsonable, write_json
from experts.config import ExpertConfig, TrainingConfig
from orchestrator.config.compute import CONTROLLER, ComputeConfig, IslandConfig, ResourcesConfig, StagesConfig
from orchestrator.config.schema import RunConfig
from orchestrator.pipeline.graph import build_graph
from orchestrator.planning.calibrate import read_place
from orchestrator.planning.calibration import (
    SAID,
    Calibration,
    Part,
    Place,
    StageSpeed,
    Work,
    find_calibration,
    identity,
)
from orchestrator.planning.estimate import best_interval_s, expected_seconds, preemption_probability
from orchestrator.planning.plan import as_json, plan
from orchestrator.planning.tables import duration, metric, plan_tables
from orchestrator.run.run_folder import RunFolder
from router.config import RouterConfig

TRAINING = TrainingConfig(steps=100, batch_size=40, checkpoint_every=30)
NETWORKS = ("expert", "monolith", "router", "expert_row", "router_row")


def island(**given) -> IslandConfig:
    return IslandConfig(address="http://127.0.1.1:8265", token_file="t", storage="/s", **given)


def configured(folder, **compute) -> RunConfig:
    islands = {
        "spot": island(cpus=2, price_per_hour=3.6, preemptible=True, preemptions_per_hour=6.0),
        "firm": island(cpus=1, price_per_hour=7.2),
    }
    return RunConfig(
        folder=str(folder),
        data=DataConfig(source="digits", image_size=8),
        partition=PartitionConfig(num_experts=4),
        expert=ExpertConfig(training=TRAINING),
        router=RouterConfig(training=replace(TRAINING, batch_size=10)),
        compute=ComputeConfig(**({"backend": "islands", "cpus": 2, "islands": islands} | compute)),
    )


def calibration_for(config: RunConfig, **places: Place) -> Calibration:
    """An image of a training step takes 10 ms on `spot`, 20 ms on `firm`; a stage at home takes a second."""
    graph = build_graph(config)
    trained = {"expert": 1000, "router": 1000, "monolith": 4000}
    home = Place(
        start_s=2.0, speeds={"controller": StageSpeed(unit_s=1.0)} | {name: StageSpeed(unit_s=0.1) for name in NETWORKS}
    )
    spot = Place(start_s=5.0, checkpoint_s=0.5, speeds={name: StageSpeed(unit_s=0.01) for name in NETWORKS})
    firm = Place(start_s=5.0, speeds={name: StageSpeed(unit_s=0.02) for name in NETWORKS})
    return Calibration(
        fingerprint=identity(graph, config.compute),
        created="today",
        work={
            stage.name: Work(flops=1e9, parts=(Part(speed=stage.kind, count=trained[stage.kind]),))
            if stage.kind in trained
            else Work(flops=0.0, parts=(Part(speed="controller", count=1),))
            for stage in graph
        },
        bytes={"codec": 100, "features": 50, "partition": 5000, "partition/clusters": 4000, "partition/holdout": 1000}
        | {f"partition/clusters/{k}": 1000 for k in range(4)}
        | {name: 800 for name in ("expert_0", "expert_1", "expert_2", "expert_3", "router", "monolith")},
        places={CONTROLLER: home, "spot": spot, "firm": firm} | places,
        parameters=1_000_000,
    )


def planned(folder, config=None, calibration=None):
    config = config or configured(folder)
    run = RunFolder(folder)
    write_json(run.calibration, calibration or calibration_for(config))
    return plan(config, run)


def rows_of(found):
    return {row.name: row for row in found.stages}


def test_times_prices_and_risks_are_those_of_the_formulas(tmp_path):
    row = rows_of(planned(tmp_path))["expert_0"]
    assert row.place == "spot" and row.flops == 1e9
    undisturbed = 1000 * 0.01 + 3 * 0.5
    expected = expected_seconds(undisturbed, 30 * 10 * 0.01 + 0.5, 6.0, 5.0 + 1.0)
    assert row.estimate.seconds == pytest.approx(undisturbed)
    assert row.estimate.extra_s == pytest.approx(expected - undisturbed)
    assert row.estimate.preemption_probability == preemption_probability(6.0, undisturbed)
    assert row.estimate.best_interval_s == best_interval_s(0.5, 6.0)
    assert row.estimate.price == pytest.approx(3.6 / 2 * expected / 3600)
    assert row.ends_s - row.starts_s == pytest.approx(5.0 + expected)


def test_trainings_go_to_islands_and_all_else_stays_at_home(tmp_path):
    found = planned(tmp_path)
    for row in found.stages:
        assert (row.place in ("spot", "firm")) == (row.kind in ("expert", "router", "monolith"))
    assert {row.place for row in found.stages} == {"controller", "spot", "firm"}
    assert found.seconds == max(row.ends_s for row in found.stages)
    assert found.critical_path_s <= found.seconds
    assert found.price == pytest.approx(sum(row.estimate.price for row in found.stages))


def test_inputs_go_to_an_island_once_and_models_come_back(tmp_path):
    rows = rows_of(planned(tmp_path))
    first, *others = sorted((row for row in rows.values() if row.place == "spot"), key=lambda row: row.starts_s)
    assert first.name == "router" and first.movement.bytes_out == 4000 + 1000 + 100
    experts = [row for row in others if row.kind == "expert"]
    assert experts and all(row.movement.bytes_out == 1000 for row in experts)
    assert all(row.movement.bytes_in == 800 for row in (first, *others))
    assert rows["dataset"].movement.bytes_out == 0


def test_what_is_finished_is_exact_and_moves_its_true_size(tmp_path):
    config, run = configured(tmp_path), RunFolder(tmp_path)
    codec = next(stage for stage in build_graph(config) if stage.kind == "codec")

    def fill(out) -> float:
        (out / "codec.json").write_text("x" * 123)
        return 7.0

    publish(run.artifact(codec), fill, stage="codec", config={}, inputs={}, island="here")
    found = rows_of(planned(tmp_path, config))
    assert found["codec"].state == "finished" and found["codec"].flops == 7.0 and found["codec"].place == "here"
    assert found["codec"].starts_s is None
    assert found["router"].movement.bytes_out == 5000 + 123


def test_without_a_calibration_islands_are_chosen_but_nothing_is_promised(tmp_path):
    found = plan(configured(tmp_path), RunFolder(tmp_path))
    assert (
        found.seconds is None and found.comparison is None and found.price == 0 and "--calibrate" in found.calibration
    )
    assert all(row.estimate is None and row.flops is None for row in found.stages)
    assert {row.place for row in found.stages if row.kind == "expert"} == {"spot", "firm"}


def test_a_calibration_of_another_configuration_is_not_used(tmp_path):
    config = configured(tmp_path)
    write_json(RunFolder(tmp_path).calibration, calibration_for(config))
    faster = replace(config, expert=replace(config.expert, training=replace(TRAINING, steps=200)))
    found, said = find_calibration(RunFolder(tmp_path), build_graph(faster), faster.compute)
    assert found is None and "another configuration" in said


def test_an_island_that_could_not_be_measured_is_a_stage_that_is_not_known(tmp_path):
    config = configured(tmp_path)
    broken = calibration_for(config, firm=Place(problem="island firm does not answer"))
    found = planned(tmp_path, config, broken)
    lacking = [row for row in found.stages if row.place == "firm"]
    assert lacking and found.unknown == tuple(row.name for row in lacking)
    assert found.comparison is None and "does not answer" in found.calibration


def test_workers_share_a_training(tmp_path):
    stages = StagesConfig(expert=ResourcesConfig(workers=2))
    config = configured(tmp_path, backend="ray", cpus=8, islands={}, stages=stages)
    found = rows_of(planned(tmp_path, config))
    assert found["expert_0"].estimate.seconds == pytest.approx(1000 * 0.1 / 2)


def test_the_monolith_gets_the_machines_of_the_experts(tmp_path):
    found = planned(tmp_path).comparison
    assert found.monolith.workers == 3  # two on spot, one on firm, which is the slowest
    assert found.monolith.step_s == pytest.approx(40 / 3 * 0.02)
    assert found.monolith.expected_s > found.monolith.seconds == pytest.approx(100 * 40 / 3 * 0.02)
    assert found.monolith.bytes_per_step == pytest.approx(8e6 * 2 / 3)
    assert 0 < found.experts_price < found.experts_s


def test_a_plan_is_json_also_if_it_would_never_end(tmp_path):
    doomed = {"spot": island(cpus=2, preemptions_per_hour=1e7)}
    config = configured(tmp_path, islands=doomed)
    told = json.loads(as_json(planned(tmp_path, config)), parse_constant=lambda name: pytest.fail(name))
    assert told["backend"] == "islands" and len(told["stages"]) == 15
    experts = [stage for stage in told["stages"] if stage["kind"] == "expert"]
    assert all(
        stage["estimate"]["extra_s"] is None and stage["estimate"]["preemption_probability"] == 1 for stage in experts
    )
    assert any("for ever" in str(cell) for cell in _cells(planned(tmp_path, config)))


def _cells(found):
    tables = [part for part in plan_tables(found) if hasattr(part, "columns")]
    return [cell for table in tables for column in table.columns for cell in column.cells]


def test_the_tables_say_it_in_eighty_columns(tmp_path):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in plan_tables(planned(tmp_path)):
        console.print(part)
    said = console.export_text()
    for words in (
        "On islands",
        "any loss",
        "price",
        "the longest chain",
        "Young's formula",
        "bit/s",
        "5.1 kB",
        "controller",
    ):
        assert words in said
    assert "…" not in said and max(map(len, said.splitlines())) <= 80


def test_a_finished_run_is_said_to_be_finished(tmp_path):
    config = configured(tmp_path)
    for stage in build_graph(config):
        publish(RunFolder(tmp_path).artifact(stage), lambda out: 0.0, stage=stage.name, config={}, inputs={})
    found = planned(tmp_path, config)
    assert found.seconds == 0.0 and found.price == 0.0 and all(row.state == "finished" for row in found.stages)
    assert "All of it is finished." in [str(part) for part in plan_tables(found)]


def test_the_log_of_a_probe_holds_its_measurement():
    place = Place(machine="m", start_s=3.0, speeds={"expert": StageSpeed(unit_s=1.0)})
    assert read_place(f"noise\n{SAID}{json.dumps(to_jsonable(place))}\nmore\n") == place
    assert read_place("Traceback\nValueError: no\n").problem == "its probe failed: ValueError: no"
    assert "nothing" in read_place("").problem


@pytest.mark.parametrize(("seconds", "words"), [(0.04, "0.0 s"), (59.9, "59.9 s"), (61, "1:01"), (7200, "2:00:00")])
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_metric_prefixes():
    assert [metric(value) for value in (0.5, 999, 1e3, 2.5e12)] == ["0.5 ", "999 ", "1 k", "2.5 T"]
