"""What a run has cost: known timelines in closed form, and a law: what is not lost is an undisturbed run's time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddm_core.artifacts import publish, to_jsonable, write_json
from orchestrator.config.compute import ComputeConfig, IslandConfig, ResourcesConfig
from orchestrator.config.schema import RunConfig
from orchestrator.reporting.costs import CostRow, cost_line, cost_rows, describe_costs, price_of, share_of, size, total
from orchestrator.run.attempts import all_attempts
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


def attempt(run, number, start, end, state, *, first=0, last=None, pace=1.0, island="", work=WORK, **asked):
    """The files of one attempt; without a state its last word is its progress."""
    folder = run.root / "work" / work / f"attempt_{number}"
    folder.mkdir(parents=True)
    write_json(folder / "job.json", {"island": island, "resources": to_jsonable(ResourcesConfig(**asked))})
    write_json(folder / "worker.json", {"host": "far", "pid": 1, "started": "1", "time": start})
    if last is not None:
        rows = "".join(f'{{"step": {step}}}\n' for step in range(10, last + 1, 10))
        (folder / "metrics.jsonl").write_text(rows)
        write_json(folder / "progress.json", {"unit": "steps", "done": last, "pace": 1 / pace, "time": end})
        (folder / "log.txt").write_text(f"continuing from step {first}\n" if first else "")
    if state not in ("", "killed"):
        write_json(folder / "outcome.json", {"state": state, "error": "", "ended": 0.0 if state == "lost" else end})


def finished(run, number, work=WORK):
    publish(run.root / "artifacts" / work, lambda out: 0.0, stage="s", config={}, inputs={}, attempt=number)


def checkpoint(run, step, work=WORK):
    (run.root / "work" / work / "state" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)


@pytest.mark.parametrize(
    ("asked", "share"),
    [
        (ResourcesConfig(cpus=2), 0.25),
        (ResourcesConfig(cpus=2, gpus=1), 0.5),
        (ResourcesConfig(cpus=1, gpus=0.5, workers=2), 0.5),
        (ResourcesConfig(cpus=6, gpus=1), 0.75),
    ],
)
def test_a_stage_holds_as_much_of_an_island_as_of_what_it_holds_most(asked, share):
    assert share_of(ISLAND, asked) == share
    assert price_of(ISLAND, asked, 1800) == pytest.approx(6.0 * share / 2)


def test_a_known_timeline_has_a_known_price(tmp_path):
    run = folder_of(tmp_path, {"paris": ISLAND})
    attempt(run, 1, 1000.0, 1090.0, "preempted", last=40, island="paris", cpus=2, gpus=1.0)
    attempt(run, 2, 2000.0, 2360.0, "finished", first=40, last=100, island="paris", cpus=2, gpus=1.0)
    attempt(run, 1, 500.0, 800.0, "finished", island="controller", work="dataset-0123456789ab")
    finished(run, 2)
    expert, dataset = sorted(cost_rows(run), key=lambda row: row.stage, reverse=True)
    assert (expert.seconds, expert.cpu_seconds, expert.gpu_seconds) == (450.0, 900.0, 450.0)
    assert expert.price == pytest.approx(6.0 * 0.5 * 450 / 3600)
    assert (dataset.price, dataset.seconds, dataset.unpriced_s) == (0.0, 300.0, 0.0)
    everything = total([expert, dataset])
    assert everything.attempts == 3 and everything.seconds == 750.0 and everything.price == expert.price


def test_a_killed_attempt_lost_what_the_next_one_did_again(tmp_path):
    run = folder_of(tmp_path)
    attempt(run, 1, 0.0 + 1e9, 1e9 + 35.0, "killed", last=50, pace=0.5, island="paris")
    attempt(run, 2, 1e9 + 60.0, 1e9 + 100.0, "finished", first=40, last=100, pace=0.5, island="paris")
    finished(run, 2)
    (row,) = cost_rows(run)
    assert row.lost_s == pytest.approx(35.0 - 40 * 0.5)
    assert row.lost_steps == 10 and row.attempts == 2
    assert row.goodput == pytest.approx((20 + 40) / 75)


def test_an_attempt_that_could_not_tell_its_pace_had_that_of_its_siblings(tmp_path):
    run = folder_of(tmp_path)
    attempt(run, 1, 1e9, 1e9 + 35.0, "killed", last=0, island="paris")
    write_json(run.root / "work" / WORK / "attempt_1" / "progress.json", {"unit": "images encoded", "time": 1e9 + 35.0})
    attempt(run, 2, 1e9 + 60.0, 1e9 + 100.0, "finished", first=40, last=100, pace=0.5, island="paris")
    finished(run, 2)
    assert cost_rows(run)[0].lost_s == pytest.approx(35.0 - 40 * 0.5)


def test_what_was_saved_before_the_end_is_not_lost(tmp_path):
    run = folder_of(tmp_path)
    attempt(run, 1, 1e9, 1e9 + 50.0, "preempted", last=50, pace=1.0)
    checkpoint(run, 50)
    assert cost_rows(run)[0].lost_s == pytest.approx(0.0)


def test_what_failed_for_good_is_all_lost(tmp_path):
    run = folder_of(tmp_path)
    attempt(run, 1, 1e9, 1e9 + 50.0, "failed", last=50)
    checkpoint(run, 50)
    (row,) = cost_rows(run)
    assert row.lost_s == row.seconds == 50.0 and row.lost_steps == 50


def test_what_still_runs_or_nobody_knows_of_is_not_lost(tmp_path):
    run = folder_of(tmp_path)
    attempt(run, 1, 1e9, 1e9 + 50.0, "", last=50, island="paris")
    (row,) = cost_rows(run)
    assert row.lost_s == 0.0 and row.seconds == 50.0
    assert all_attempts(run)[0].state == "running"


def test_a_worker_that_published_and_died_has_finished(tmp_path):
    run = folder_of(tmp_path)
    attempt(run, 1, 1e9, 1e9 + 50.0, "killed", last=50, island="paris")
    finished(run, 1)
    assert all_attempts(run)[0].state == "finished" and cost_rows(run)[0].lost_s == 0.0


def test_checkpoints_that_vanished_make_earlier_work_vain(tmp_path):
    run = folder_of(tmp_path)
    attempt(run, 1, 1e9, 1e9 + 50.0, "preempted", last=50)
    attempt(run, 2, 1e9 + 100, 1e9 + 120.0, "preempted", first=50, last=70)
    attempt(run, 3, 1e9 + 200, 1e9 + 300.0, "finished", first=0, last=100)
    finished(run, 3)
    assert cost_rows(run)[0].lost_s == pytest.approx(70.0)


def test_another_configuration_of_a_stage_keeps_its_own_checkpoints_and_adds_to_the_row(tmp_path):
    run = folder_of(tmp_path)
    other = "expert_0-ffffffffffff"
    attempt(run, 1, 1e9, 1e9 + 50.0, "killed", last=50, island="paris")
    attempt(run, 2, 1e9 + 60, 1e9 + 110.0, "finished", first=50, last=100)
    attempt(run, 1, 1e9 + 120, 1e9 + 150.0, "killed", last=30, work=other, island="paris")
    attempt(run, 2, 1e9 + 155, 1e9 + 255.0, "finished", first=0, last=100, work=other)
    finished(run, 2)
    finished(run, 2, other)
    (row,) = cost_rows(run)
    assert row.attempts == 4 and row.seconds == 230.0 and row.lost_s == pytest.approx(30.0)


def test_an_island_that_the_configuration_forgot_has_no_price(tmp_path):
    run = folder_of(tmp_path)
    attempt(run, 1, 1e9, 1e9 + 50.0, "finished", island="atlantis")
    (row,) = cost_rows(run)
    assert row.price == 0.0 and row.unpriced_s == 50.0


def test_waiting_and_moving_come_from_the_journal(tmp_path):
    run = folder_of(tmp_path)
    run.record("submitted", stage="expert_0", fingerprint="0123456789ab" + 52 * "0", attempt=1)
    submitted = run.events()[0]["time"]
    attempt(run, 1, submitted + 7.0, submitted + 9.0, "finished")
    run.record("moved", stage="expert_0", attempt=1, bytes=1000, direction="out")
    run.record("moved", stage="expert_0", attempt=1, bytes=500, direction="out")
    run.record("moved", stage="expert_0", attempt=1, bytes=30, direction="in")
    (row,) = cost_rows(run)
    assert row.waiting_s == pytest.approx(7.0) and (row.bytes_out, row.bytes_in) == (1500, 30)


def test_an_attempt_at_home_that_died_ends_with_its_youngest_file(tmp_path):
    run = folder_of(tmp_path)
    attempt(run, 1, 1e9, 1e9 + 10.0, "lost", last=10)
    log = next((run.root / "work").rglob("log.txt"))
    assert all_attempts(run)[0].end == log.stat().st_mtime > 1e9 + 10.0


def test_a_run_that_has_not_begun_costs_nothing(tmp_path):
    run = folder_of(tmp_path)
    (run.root / "work" / WORK / "attempt_1").mkdir(parents=True)
    assert cost_rows(run) == [] and cost_line(run) == ""
    assert total([]).goodput == 1.0


def test_a_line_says_only_what_there_was():
    assert (
        describe_costs(CostRow(stage="x", attempts=2, cpu_seconds=90.0)) == "2 attempts · 1:30 CPU time · nothing lost"
    )
    rich = CostRow(stage="x", attempts=1, seconds=100, gpu_seconds=60, price=1.5, lost_s=25, bytes_out=1500, bytes_in=1)
    for word in ("1:00 GPU time", "price 1.5", "0:25 lost, goodput 75.0%", "1.5 kB to islands, 1 B back"):
        assert word in describe_costs(rich)


@pytest.mark.parametrize(("count", "words"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (12_345_678, "12.3 MB")])
def test_sizes(count, words):
    assert size(count) == words


@settings(max_examples=25, deadline=None)
@given(
    kills=st.lists(st.integers(min_value=1, max_value=180), max_size=6),
    every=st.integers(min_value=1, max_value=50),
    pace=st.floats(min_value=0.01, max_value=5.0),
    start_s=st.floats(min_value=0.0, max_value=30.0),
)
def test_what_is_not_lost_is_the_time_of_an_undisturbed_run(tmp_path_factory, kills, every, pace, start_s):
    """Killed after any number of steps, any number of times; every row is a step, so that nothing is unreported."""
    run, steps, saved, now, number = folder_of(tmp_path_factory.mktemp("run")), 100, 0, 1e9, 1
    for kill in kills:
        reached = saved + kill
        if reached >= steps:
            break
        now = _write(run, number, now, start_s, pace, saved, reached, "lost")
        saved, number = max(saved, reached // every * every), number + 1
    _write(run, number, now, start_s, pace, saved, steps, "finished")
    finished(run, number)
    (row,) = cost_rows(run)
    assert row.seconds - row.lost_s == pytest.approx(start_s + pace * steps)
    assert row.attempts == number
    assert 0.0 <= row.lost_s <= row.seconds


def _write(run, number, now, start_s, pace, first, last, state) -> float:
    end = now + start_s + pace * (last - first)
    attempt(run, number, now, end, state, first=first, last=last, pace=pace, island="paris")
    rows = "".join(f'{{"step": {step}}}\n' for step in range(1, last + 1))
    (run.root / "work" / WORK / f"attempt_{number}" / "metrics.jsonl").write_text(rows)
    return end + 10.0
