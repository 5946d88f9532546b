"""The plan of a small run on two islands, from speeds that are easy to calculate with."""

import json
from dataclasses import replace

import pytest
from rich.console import Console

from data_partition.config import DataConfig, PartitionConfig
from ddm_core.artifacts import publish, to_jsonable, write_json
from experts.config import CodecConfig, ExpertConfig, TrainingConfig
from orchestrator.config.compute import CONTROLLER, ComputeConfig, IslandConfig, ResourcesConfig, StagesConfig
from orchestrator.config.schema import RunConfig
from orchestrator.pipeline.graph import build_graph
from orchestrator.planning.calibrate import parse_place
from orchestrator.planning.calibration import (
    RESULT_PREFIX,
    Calibration,
    Part,
    Place,
    StageSpeed,
    Work,
    calibration_fingerprint,
    find_calibration,
)
from orchestrator.planning.estimate import best_interval_s, expected_seconds, preemption_probability
from orchestrator.planning.plan import plan_run
from orchestrator.planning.tables import format_bytes, format_duration, format_metric, plan_tables
from orchestrator.reporting.terminal import format_json
from orchestrator.run.run_folder import RunFolder
from router.config import RouterConfig

TRAINING = TrainingConfig(steps=100, batch_size=40, checkpoint_every=30)
NETWORKS = ("expert", "monolith", "router", "expert_row", "router_row")


def island(**fields) -> IslandConfig:
    return IslandConfig(address="http://127.0.1.1:8265", token_file="t", storage="/s", **fields)


def build_config(folder, **compute) -> RunConfig:
    islands = {
        "spot": island(cpus=2, price_per_hour=3.6, preemptible=True, preemptions_per_hour=6.0),
        "firm": island(cpus=1, price_per_hour=7.2),
    }
    return RunConfig(
        folder=str(folder),
        data=DataConfig(source="digits", image_size=8),
        codec=CodecConfig(components=32),
        partition=PartitionConfig(num_experts=4),
        expert=ExpertConfig(training=TRAINING),
        router=RouterConfig(training=replace(TRAINING, batch_size=10)),
        compute=ComputeConfig(**({"backend": "islands", "cpus": 2, "islands": islands} | compute)),
    )


def build_calibration(config: RunConfig, **places: Place) -> Calibration:
    """An image of a training step takes 10 ms on `spot`, 20 ms on `firm`; a controller's stage takes a second."""
    graph = build_graph(config)
    counts = {"expert": 1000, "router": 1000, "monolith": 4000}
    controller = Place(
        start_s=2.0, speeds={"controller": StageSpeed(unit_s=1.0)} | {name: StageSpeed(unit_s=0.1) for name in NETWORKS}
    )
    spot = Place(start_s=5.0, checkpoint_s=0.5, speeds={name: StageSpeed(unit_s=0.01) for name in NETWORKS})
    firm = Place(start_s=5.0, speeds={name: StageSpeed(unit_s=0.02) for name in NETWORKS})
    return Calibration(
        fingerprint=calibration_fingerprint(graph, config.compute),
        created="today",
        work={
            stage.name: Work(flops=1e9, parts=(Part(speed=stage.kind, count=counts[stage.kind]),))
            if stage.kind in counts
            else Work(flops=0.0, parts=(Part(speed="controller", count=1),))
            for stage in graph
        },
        bytes={
            "codec": 100,
            "features": 50,
            "partition": 5000,
            "partition/latents": 4000,
            "partition/holdout_latents": 1000,
        }
        | {f"partition/latents/{k}": 1000 for k in range(4)}
        | {f"partition/holdout_latents/{k}": 250 for k in range(4)}
        | {name: 800 for name in ("expert_0", "expert_1", "expert_2", "expert_3", "router", "monolith")},
        places={CONTROLLER: controller, "spot": spot, "firm": firm} | places,
        parameters=1_000_000,
    )


def make_plan(folder, config=None, calibration=None):
    config = config or build_config(folder)
    run = RunFolder(folder)
    write_json(run.calibration, calibration or build_calibration(config))
    return plan_run(config, run)


def rows_by_name(plan):
    return {row.name: row for row in plan.stages}


def test_times_prices_and_risks_follow_the_formulas(tmp_path):
    row = rows_by_name(make_plan(tmp_path))["expert_0"]
    assert row.place == "spot" and row.flops == 1e9
    undisturbed = 1000 * 0.01 + 3 * 0.5
    expected = expected_seconds(undisturbed, 30 * 10 * 0.01 + 0.5, 6.0, 5.0 + 1.0)
    assert row.estimate.seconds == pytest.approx(undisturbed)
    assert row.estimate.extra_s == pytest.approx(expected - undisturbed)
    assert row.estimate.preemption_probability == preemption_probability(6.0, undisturbed)
    assert row.estimate.best_interval_s == best_interval_s(0.5, 6.0)
    assert row.estimate.price == pytest.approx(3.6 / 2 * expected / 3600)
    assert row.ends_s - row.starts_s == pytest.approx(5.0 + expected)


def test_only_trainings_run_on_islands(tmp_path):
    plan = make_plan(tmp_path)
    for row in plan.stages:
        assert (row.place in ("spot", "firm")) == (row.kind in ("expert", "router", "monolith"))
    assert {row.place for row in plan.stages} == {"controller", "spot", "firm"}
    assert plan.seconds == max(row.ends_s for row in plan.stages)
    assert plan.critical_path_s <= plan.seconds
    assert plan.price == pytest.approx(sum(row.estimate.price for row in plan.stages))


def test_inputs_are_sent_to_an_island_once(tmp_path):
    rows = rows_by_name(make_plan(tmp_path))
    first, *others = sorted((row for row in rows.values() if row.place == "spot"), key=lambda row: row.starts_s)
    assert first.name == "expert_0" and first.movement.bytes_out == 1250 + 100
    assert rows["router"].movement.bytes_out == 4000 + 1000
    experts = [row for row in others if row.kind == "expert"]
    assert experts and all(row.movement.bytes_out == 1250 for row in experts)
    assert all(row.movement.bytes_in == 800 for row in (first, *others))
    assert rows["dataset"].movement.bytes_out == 0


def test_finished_stages_have_exact_cost_and_size(tmp_path):
    config, run = build_config(tmp_path), RunFolder(tmp_path)
    codec = next(stage for stage in build_graph(config) if stage.kind == "codec")

    def fill(out) -> float:
        (out / "codec.json").write_text("x" * 123)
        return 7.0

    publish(run.artifact(codec), fill, stage="codec", config={}, inputs={}, island="here")
    plan = rows_by_name(make_plan(tmp_path, config))
    assert plan["codec"].state == "finished" and plan["codec"].flops == 7.0 and plan["codec"].place == "here"
    assert plan["codec"].starts_s is None
    assert plan["expert_0"].movement.bytes_out == 1250 + 123


def test_plan_without_calibration_has_places_but_no_estimates(tmp_path):
    plan = plan_run(build_config(tmp_path), RunFolder(tmp_path))
    assert plan.seconds is None and plan.comparison is None and plan.price == 0 and "--calibrate" in plan.calibration
    assert all(row.estimate is None for row in plan.stages)
    sized = [row for row in plan.stages if row.kind in ("expert", "monolith", "router")]
    assert all(row.flops and row.parameters and row.memory_bytes for row in sized)
    assert {row.place for row in plan.stages if row.kind == "expert"} == {"spot", "firm"}


def test_calibration_of_another_configuration_is_ignored(tmp_path):
    config = build_config(tmp_path)
    write_json(RunFolder(tmp_path).calibration, build_calibration(config))
    faster = replace(config, expert=replace(config.expert, training=replace(TRAINING, steps=200)))
    calibration, text = find_calibration(RunFolder(tmp_path), build_graph(faster), faster.compute)
    assert calibration is None and "another configuration" in text


def test_stages_on_an_unmeasured_island_are_unknown(tmp_path):
    config = build_config(tmp_path)
    broken = build_calibration(config, firm=Place(problem="island firm does not answer"))
    plan = make_plan(tmp_path, config, broken)
    unknown = [row for row in plan.stages if row.place == "firm"]
    assert unknown and plan.unknown == tuple(row.name for row in unknown)
    assert plan.comparison is None and "does not answer" in plan.calibration


def test_workers_divide_a_training(tmp_path):
    stages = StagesConfig(expert=ResourcesConfig(workers=2))
    config = build_config(tmp_path, backend="ray", cpus=8, islands={}, stages=stages)
    plan = rows_by_name(make_plan(tmp_path, config))
    assert plan["expert_0"].estimate.seconds == pytest.approx(1000 * 0.1 / 2)


def test_monolith_uses_the_machines_of_the_experts(tmp_path):
    comparison = make_plan(tmp_path).comparison
    assert comparison.monolith.workers == 3  # two on spot, one on firm, which is the slowest
    assert comparison.monolith.step_s == pytest.approx(40 / 3 * 0.02)
    assert comparison.monolith.expected_s > comparison.monolith.seconds == pytest.approx(100 * 40 / 3 * 0.02)
    assert comparison.monolith.bytes_per_step == pytest.approx(8e6 * 2 / 3)
    assert 0 < comparison.experts_price < comparison.experts_s


def test_infinite_plan_is_valid_json(tmp_path):
    islands = {"spot": island(cpus=2, preemptions_per_hour=1e7)}
    config = build_config(tmp_path, islands=islands)
    content = json.loads(format_json(make_plan(tmp_path, config)), parse_constant=lambda name: pytest.fail(name))
    assert content["backend"] == "islands" and len(content["stages"]) == 13
    experts = [stage for stage in content["stages"] if stage["kind"] == "expert"]
    assert all(
        stage["estimate"]["extra_s"] is None and stage["estimate"]["preemption_probability"] == 1 for stage in experts
    )
    assert any("forever" in str(cell) for cell in _cells(make_plan(tmp_path, config)))


def _cells(plan):
    tables = [part for part in plan_tables(plan) if hasattr(part, "columns")]
    return [cell for table in tables for column in table.columns for cell in column.cells]


def test_tables_fit_eighty_columns(tmp_path):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in plan_tables(make_plan(tmp_path)):
        console.print(part)
    text = console.export_text()
    for words in (
        "On islands",
        "any loss",
        "price",
        "the longest chain",
        "Young's formula",
        "bit/s",
        format_bytes(1350),
        "controller",
    ):
        assert words in text
    assert "…" not in text and max(map(len, text.splitlines())) <= 80


def test_finished_run_is_reported_as_finished(tmp_path):
    config = build_config(tmp_path)
    for stage in build_graph(config):
        publish(RunFolder(tmp_path).artifact(stage), lambda out: 0.0, stage=stage.name, config={}, inputs={})
    plan = make_plan(tmp_path, config)
    assert plan.seconds == 0.0 and plan.price == 0.0 and all(row.state == "finished" for row in plan.stages)
    assert "All stages are finished." in [str(part) for part in plan_tables(plan)]


def test_probe_log_contains_its_measurement():
    place = Place(machine="m", start_s=3.0, speeds={"expert": StageSpeed(unit_s=1.0)})
    assert parse_place(f"noise\n{RESULT_PREFIX}{json.dumps(to_jsonable(place))}\nmore\n") == place
    assert parse_place("Traceback\nValueError: no\n").problem == "its probe failed: ValueError: no"
    assert "nothing" in parse_place("").problem


@pytest.mark.parametrize(("seconds", "words"), [(0.04, "0.0 s"), (59.9, "59.9 s"), (61, "1:01"), (7200, "2:00:00")])
def test_format_duration(seconds, words):
    assert format_duration(seconds) == words


def test_format_metric_uses_prefixes():
    assert [format_metric(value) for value in (0.5, 999, 1e3, 2.5e12)] == ["0.5 ", "999 ", "1 k", "2.5 T"]
