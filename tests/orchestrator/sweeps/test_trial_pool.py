"""Parallel trials: their number, how they end, and what remains after the sweep is killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from orchestrator.run.lease import hold_lease, read_holder
from orchestrator.sweeps.trial_pool import TrialPool
from tests.orchestrator.sweeps.fake_sweep import METRIC, build_fake_trial, fake_trial_command
from tests.orchestrator.sweeps.fake_trial import SEED_THAT_FAILS, SEED_THAT_NEVER_ENDS


def open_pool(parallel=2) -> TrialPool:
    return TrialPool(lambda: parallel, lambda: os.environ, METRIC, fake_trial_command)


def wait_for_ends(pool, count=1):
    ends = []
    deadline = time.monotonic() + 60
    while len(ends) < count and time.monotonic() < deadline:
        ends += pool.poll(0.5)
    return ends


def build_trial(folder, number=0, seed=0):
    return build_fake_trial(folder, number, {"expert.training.lr": f"0.00{number + 1}"}, seed)


def wait_until(condition, name="the condition", limit_s=60):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{name} took more than {limit_s} s"
        time.sleep(0.02)


def test_finished_trial_is_not_run_again(tmp_path):
    trials = open_pool()
    trials.start(build_trial(tmp_path))
    first = wait_for_ends(trials)[0]
    assert (first.state, first.score) == ("finished", 0.001) and first.seconds > 0
    before = (build_trial(tmp_path).run.journal).read_bytes()
    trials.start(build_trial(tmp_path))
    assert not trials.running
    second = wait_for_ends(trials)[0]
    assert (second.state, second.score, second.seconds) == ("finished", 0.001, 0.0)
    assert build_trial(tmp_path).run.journal.read_bytes() == before and trials.is_idle


def test_failure_has_its_error_and_leaves_other_trials(tmp_path):
    trials = open_pool()
    trials.start(build_trial(tmp_path, 0, SEED_THAT_FAILS))
    trials.start(build_trial(tmp_path, 1))
    assert not trials.has_room
    ends = {end.trial.number: end for end in wait_for_ends(trials, 2)}
    assert ends[0].state == "failed" and ends[0].error == "the disk is full\n  and so is the other one"
    assert ends[1].state == "finished" and trials.has_room


def test_trial_that_cannot_start_is_a_failure(tmp_path):
    (tmp_path / build_trial(tmp_path).label).write_text("a file where the folder should be")
    trials = open_pool()
    trials.start(build_trial(tmp_path))
    assert wait_for_ends(trials)[0].state == "failed"


def test_damaged_scores_are_a_failure_with_file_name(tmp_path):
    trials = open_pool()
    trials.start(build_trial(tmp_path))
    wait_for_ends(trials)
    for scores in tmp_path.glob("*/artifacts/score_*/scores.json"):
        scores.write_text("{}")
    trials.start(build_trial(tmp_path))
    damaged = wait_for_ends(trials)[0]
    assert damaged.state == "failed" and "scores.json" in damaged.error


def test_killed_controller_is_a_failure_with_its_signal(tmp_path):
    trials = open_pool()
    trials.start(build_trial(tmp_path, 0, SEED_THAT_NEVER_ENDS))
    next(iter(trials.running.values())).process.kill()
    assert "SIGKILL" in wait_for_ends(trials)[0].error


def test_stopped_trials_save_their_work(tmp_path):
    trials = open_pool()
    trials.start(build_trial(tmp_path, 0, SEED_THAT_NEVER_ENDS))
    wait_until(build_trial(tmp_path).run.journal.exists)
    trials.stop()
    assert not trials.has_room
    assert [end.state for end in wait_for_ends(trials)] == ["stopped"]
    assert read_holder(build_trial(tmp_path).run) is None


def test_pool_waits_for_another_controller(tmp_path):
    trials = open_pool()
    waiting = build_trial(tmp_path)
    waiting.run.root.mkdir()
    with hold_lease(waiting.run):
        trials.start(waiting)
        assert not trials.poll(0.5) and trials.running[waiting.label].process is None
        assert not waiting.run.journal.exists()
    assert wait_for_ends(trials)[0].state == "finished"


def test_run_finished_by_another_controller_is_not_repeated(tmp_path):
    trials = open_pool()
    waiting = build_trial(tmp_path)
    waiting.run.save_config(waiting.config)
    with hold_lease(waiting.run):
        trials.start(waiting)
        code = "import sys; from pathlib import Path; from orchestrator.run.run_folder import RunFolder\n"
        code += "from tests.orchestrator.sweeps.fake_trial import run_fake_trial\n"
        code += "run_fake_trial(RunFolder(Path(sys.argv[1])))"
        subprocess.run([sys.executable, "-c", code, str(waiting.run.root)], check=True)
    assert wait_for_ends(trials)[0].state == "finished"
    assert [event["event"] for event in waiting.run.read_events()].count("run_started") == 1


def test_trial_gets_only_the_given_environment(tmp_path):
    output = tmp_path / "environment"
    code = f"import json, os; open({str(output)!r}, 'w').write(json.dumps(dict(os.environ)))"
    trials = TrialPool(lambda: 1, lambda: {"ONLY": "this"}, METRIC, lambda trial: [sys.executable, "-I", "-c", code])
    trials.start(build_trial(tmp_path))
    wait_for_ends(trials)
    assert set(json.loads(output.read_text())) <= {"ONLY", "LC_CTYPE"}


def test_trials_end_with_a_killed_sweep(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path\n"
        "from tests.orchestrator.sweeps.fake_sweep import *\n"
        "pool = TrialPool(lambda: 1, lambda: os.environ, METRIC, fake_trial_command)\n"
        "pool.start(build_fake_trial(Path(sys.argv[1]), 0, {'expert.training.lr': '0.001'}, 2))\n"
        "time.sleep(600)"
    )
    sweep = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    run = build_trial(tmp_path).run
    wait_until(lambda: read_holder(run) is not None)
    child = read_holder(run).process["pid"]
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    try:
        wait_until(lambda: not _is_running(child), "the end of the trial", limit_s=20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _is_running(pid) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("parallel", [1, 3])
def test_parallel_trials_stay_within_the_limit(tmp_path, parallel):
    trials = open_pool(parallel)
    waiting = [build_trial(tmp_path, number) for number in range(5)]
    max_running = 0
    while waiting or not trials.is_idle:
        while waiting and trials.has_room:
            trials.start(waiting.pop())
        max_running = max(max_running, sum(entry.process is not None for entry in trials.running.values()))
        trials.poll(0.2)
    assert max_running == parallel
