"""Costs of a run: known timelines in closed form, and a law: time that is not lost equals an undisturbed run's."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddm_core.artifacts import publish, write_record
from orchestrator.config.compute import ComputeConfig, IslandConfig, ResourcesConfig
from orchestrator.config.schema import RunConfig
from orchestrator.reporting.costs import (
    CostRow,
    format_bytes,
    format_costs,
    format_run_costs,
    island_share,
    load_costs,
    reservation_price,
    sum_costs,
)
from orchestrator.run.attempts import load_all_attempts
from orchestrator.run.backend import AttemptOutcome, Job
from orchestrator.run.run_folder import RunFolder

ISLAND = IslandConfig(address="http://127.0.1.1:8265", token_file="t", storage="/s", cpus=8, gpus=2, price_per_hour=6.0)
TWO_CPUS = ResourcesConfig(cpus=2)
WORK = "expert_0-0123456789ab"


def folder_of(path, islands=None) -> RunFolder:
    path.mkdir(parents=True, exist_ok=True)
    run = RunFolder(path)
    compute = ComputeConfig(backend="islands", islands=islands) if islands else ComputeConfig()
    run.save_config(RunConfig(folder=str(path), compute=compute))
    return run


def make_job(number: int, island: str, **resources) -> Job:
    return Job(
        stage="expert_0",
        kind="expert",
        config={},
        inputs={},
        input_fingerprints={},
        artifact="a",
        scratch="s",
        attempt=number,
        stop_files=(),
        island=island,
        resources=ResourcesConfig(**resources),
    )


def attempt(run, number, start, end, state, *, first=0, last=None, pace=1.0, island="", work=WORK, **resources):
    """Write the files of one attempt; without a state, its progress is its last sign of life."""
    folder = run.root / "work" / work / f"attempt_{number}"
    folder.mkdir(parents=True)
    write_record(folder / "job.json", make_job(number, island, **resources))
    write_record(folder / "worker.json", {"host": "far", "pid": 1, "started": "1", "time": start})
    if last is not None:
        rows = "".join(f'{{"step": {step}}}\n' for step in range(10, last + 1, 10))
        (folder / "metrics.jsonl").write_text(rows)
        write_record(folder / "progress.json", {"unit": "steps", "done": last, "pace": 1 / pace, "time": end})
        (folder / "log.txt").write_text(f"continuing from step {first}\n" if first else "")
    if state not in ("", "killed"):
        ended = 0.0 if state == "lost" else end
        write_record(folder / "outcome.json", AttemptOutcome(stage="x", attempt=number, state=state, ended=ended))


def finished(run, number, work=WORK):
    publish(run.root / "artifacts" / work, lambda out: 0.0, stage="s", config={}, inputs={}, attempt=number)


def checkpoint(run, step, work=WORK):
    (run.root / "work" / work / "state" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


@pytest.mark.parametrize(
    ("resources", "share"),
    [
        (ResourcesConfig(cpus=2), 0.25),
        (ResourcesConfig(cpus=2, gpus=1), 0.5),
        (ResourcesConfig(cpus=1, gpus=0.5, workers=2), 0.5),
        (ResourcesConfig(cpus=6, gpus=1), 0.75),
    ],
)
def test_island_share_is_the_larger_of_cpus_and_gpus(resources, share):
    assert island_share(ISLAND, resources) == share
    assert reservation_price(ISLAND, resources, 1800) == pytest.approx(6.0 * share / 2)


def test_price_of_a_known_timeline_is_exact(tmp_path):
    run = folder_of(tmp_path, {"paris": ISLAND})
    attempt(run, 1, 1000.0, 1090.0, "preempted", last=40, island="paris", cpus=2, gpus=1.0)
    attempt(run, 2, 2000.0, 2360.0, "finished", first=40, last=100, island="paris", cpus=2, gpus=1.0)
    attempt(run, 1, 500.0, 800.0, "finished", island="controller", work="dataset-0123456789ab")
    finished(run, 2)
    expert, dataset = sorted(load_costs(run), key=lambda row: row.stage, reverse=True)
    assert (expert.seconds, expert.cpu_seconds, expert.gpu_seconds) == (450.0, 900.0, 450.0)
    assert expert.price == pytest.approx(6.0 * 0.5 * 450 / 3600)
    assert (dataset.price, dataset.seconds, dataset.unpriced_s) == (0.0, 300.0, 0.0)
    everything = sum_costs([expert, dataset])
    assert everything.attempts == 3 and everything.seconds == 750.0 and everything.price == expert.price


def test_killed_attempt_loses_the_repeated_steps(tmp_path):
    run = folder_of(tmp_path)
    attempt(run, 1, 0.0 + 1e9, 1e9 + 35.0, "killed", last=50, pace=0.5, island="paris")
    attempt(run, 2, 1e9 + 60.0, 1e9 + 100.0, "finished", first=40, last=100, pace=0.5, island="paris")
    finished(run, 2)
    (row,) = load_costs(run)
    assert row.lost_s == pytest.approx(35.0 - 40 * 0.5)
    assert row.lost_steps == 10 and row.attempts == 2
    assert row.goodput == pytest.approx((20 + 40) / 75)


def test_attempt_without_pace_takes_that_of_its_siblings(tmp_path):
    run = folder_of(tmp_path)
    attempt(run, 1, 1e9, 1e9 + 35.0, "killed", last=0, island="paris")
    write_record(
        run.root / "work" / WORK / "attempt_1" / "progress.json", {"unit": "images encoded", "time": 1e9 + 35.0}
    )
    attempt(run, 2, 1e9 + 60.0, 1e9 + 100.0, "finished", first=40, last=100, pace=0.5, island="paris")
    finished(run, 2)
    assert load_costs(run)[0].lost_s == pytest.approx(35.0 - 40 * 0.5)


def test_work_saved_before_the_end_is_not_lost(tmp_path):
    run = folder_of(tmp_path)
    attempt(run, 1, 1e9, 1e9 + 50.0, "preempted", last=50, pace=1.0)
    checkpoint(run, 50)
    assert load_costs(run)[0].lost_s == pytest.approx(0.0)


def test_failed_attempt_loses_everything(tmp_path):
    run = folder_of(tmp_path)
    attempt(run, 1, 1e9, 1e9 + 50.0, "failed", last=50)
    checkpoint(run, 50)
    (row,) = load_costs(run)
    assert row.lost_s == row.seconds == 50.0 and row.lost_steps == 50


def test_running_or_unknown_attempt_loses_nothing(tmp_path):
    run = folder_of(tmp_path)
    attempt(run, 1, 1e9, 1e9 + 50.0, "", last=50, island="paris")
    (row,) = load_costs(run)
    assert row.lost_s == 0.0 and row.seconds == 50.0
    assert load_all_attempts(run)[0].state == "running"


def test_worker_that_dies_after_publishing_has_finished(tmp_path):
    run = folder_of(tmp_path)
    attempt(run, 1, 1e9, 1e9 + 50.0, "killed", last=50, island="paris")
    finished(run, 1)
    assert load_all_attempts(run)[0].state == "finished" and load_costs(run)[0].lost_s == 0.0


def test_vanished_checkpoints_make_earlier_work_lost(tmp_path):
    run = folder_of(tmp_path)
    attempt(run, 1, 1e9, 1e9 + 50.0, "preempted", last=50)
    attempt(run, 2, 1e9 + 100, 1e9 + 120.0, "preempted", first=50, last=70)
    attempt(run, 3, 1e9 + 200, 1e9 + 300.0, "finished", first=0, last=100)
    finished(run, 3)
    assert load_costs(run)[0].lost_s == pytest.approx(70.0)


def test_other_configuration_has_its_own_checkpoints(tmp_path):
    run = folder_of(tmp_path)
    other = "expert_0-ffffffffffff"
    attempt(run, 1, 1e9, 1e9 + 50.0, "killed", last=50, island="paris")
    attempt(run, 2, 1e9 + 60, 1e9 + 110.0, "finished", first=50, last=100)
    attempt(run, 1, 1e9 + 120, 1e9 + 150.0, "killed", last=30, work=other, island="paris")
    attempt(run, 2, 1e9 + 155, 1e9 + 255.0, "finished", first=0, last=100, work=other)
    finished(run, 2)
    finished(run, 2, other)
    (row,) = load_costs(run)
    assert row.attempts == 4 and row.seconds == 230.0 and row.lost_s == pytest.approx(30.0)


def test_island_missing_in_the_configuration_is_unpriced(tmp_path):
    run = folder_of(tmp_path)
    attempt(run, 1, 1e9, 1e9 + 50.0, "finished", island="atlantis")
    (row,) = load_costs(run)
    assert row.price == 0.0 and row.unpriced_s == 50.0


def test_waiting_time_and_bytes_come_from_the_journal(tmp_path):
    run = folder_of(tmp_path)
    run.record("submitted", stage="expert_0", fingerprint="0123456789ab" + 52 * "0", attempt=1)
    submitted = run.read_events()[0]["time"]
    attempt(run, 1, submitted + 7.0, submitted + 9.0, "finished")
    run.record("moved", stage="expert_0", attempt=1, bytes=1000, direction="out")
    run.record("moved", stage="expert_0", attempt=1, bytes=500, direction="out")
    run.record("moved", stage="expert_0", attempt=1, bytes=30, direction="in")
    (row,) = load_costs(run)
    assert row.waiting_s == pytest.approx(7.0) and (row.bytes_out, row.bytes_in) == (1500, 30)


def test_lost_local_attempt_ends_with_its_newest_file(tmp_path):
    run = folder_of(tmp_path)
    attempt(run, 1, 1e9, 1e9 + 10.0, "lost", last=10)
    log = next((run.root / "work").rglob("log.txt"))
    assert load_all_attempts(run)[0].end == log.stat().st_mtime > 1e9 + 10.0


def test_run_without_attempts_costs_nothing(tmp_path):
    run = folder_of(tmp_path)
    (run.root / "work" / WORK / "attempt_1").mkdir(parents=True)
    assert load_costs(run) == [] and format_run_costs(run) == ""
    assert sum_costs([]).goodput == 1.0


def test_format_costs_leaves_out_zero_quantities():
    assert (
        format_costs(CostRow(stage="x", attempts=2, cpu_seconds=90.0))
        == "2 attempts · 1:30 of reserved CPU time · no work done twice"
    )
    rich = CostRow(stage="x", attempts=1, seconds=100, gpu_seconds=60, price=1.5, lost_s=25, bytes_out=1500, bytes_in=1)
    for word in ("1:00 of reserved GPU time", "price 1.5", "0:25 lost, goodput 75.0%", "1.5 kB to islands, 1 B back"):
        assert word in format_costs(rich)


@pytest.mark.parametrize(("count", "words"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (12_345_678, "12.3 MB")])
def test_format_bytes_has_three_digits_and_a_prefix(count, words):
    assert format_bytes(count) == words


@settings(max_examples=25, deadline=None)
@given(
    kills=st.lists(st.integers(min_value=1, max_value=180), max_size=6),
    every=st.integers(min_value=1, max_value=50),
    pace=st.floats(min_value=0.01, max_value=5.0),
    start_s=st.floats(min_value=0.0, max_value=30.0),
)
def test_time_not_lost_equals_an_undisturbed_run(tmp_path_factory, kills, every, pace, start_s):
    """Kill after any number of steps, any number of times; every row is a step, so that nothing is unreported."""
    run, steps, saved, now, number = folder_of(tmp_path_factory.mktemp("run")), 100, 0, 1e9, 1
    for kill in kills:
        reached = saved + kill
        if reached >= steps:
            break
        now = _write(run, number, now, start_s, pace, saved, reached, "lost")
        saved, number = max(saved, reached // every * every), number + 1
    _write(run, number, now, start_s, pace, saved, steps, "finished")
    finished(run, number)
    (row,) = load_costs(run)
    assert row.seconds - row.lost_s == pytest.approx(start_s + pace * steps)
    assert row.attempts == number
    assert 0.0 <= row.lost_s <= row.seconds


def _write(run, number, now, start_s, pace, first, last, state) -> float:
    end = now + start_s + pace * (last - first)
    attempt(run, number, now, end, state, first=first, last=last, pace=pace, island="paris")
    rows = "".join(f'{{"step": {step}}}\n' for step in range(1, last + 1))
    (run.root / "work" / WORK / f"attempt_{number}" / "metrics.jsonl").write_text(rows)
    return end + 10.0
