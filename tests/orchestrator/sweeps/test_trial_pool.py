"""Trials at once: how many, how they end, and who is left when the sweep is killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from orchestrator.run.lease import hold_lease
from orchestrator.sweeps.trial_pool import TrialPool
from tests.orchestrator.sweeps.fake_sweep import METRIC, command, trial_in
from tests.orchestrator.sweeps.fake_trial import FAILS, NEVER_ENDS


def pool(parallel=2) -> TrialPool:
    return TrialPool(lambda: parallel, lambda: os.environ, METRIC, command)


def end_of(pool, count=1):
    ends = []
    deadline = time.monotonic() + 60
    while len(ends) < count and time.monotonic() < deadline:
        ends += pool.poll(0.5)
    return ends


def trial(folder, number=0, seed=0):
    return trial_in(folder, number, {"expert.training.lr": f"0.00{number + 1}"}, seed)


def wait_until(true, what="it", limit_s=60):
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, f"{what} took more than {limit_s} s"
        time.sleep(0.02)


def test_a_trial_runs_to_its_end_and_is_not_run_again(tmp_path):
    trials = pool()
    trials.start(trial(tmp_path))
    first = end_of(trials)[0]
    assert (first.state, first.score) == ("finished", 0.001) and first.seconds > 0
    before = (trial(tmp_path).run.journal).read_bytes()
    trials.start(trial(tmp_path))
    assert not trials.members
    again = end_of(trials)[0]
    assert (again.state, again.score, again.seconds) == ("finished", 0.001, 0.0)
    assert trial(tmp_path).run.journal.read_bytes() == before and trials.is_idle


def test_a_failure_says_why_and_sinks_nobody(tmp_path):
    trials = pool()
    trials.start(trial(tmp_path, 0, FAILS))
    trials.start(trial(tmp_path, 1))
    assert not trials.has_room
    ends = {end.trial.number: end for end in end_of(trials, 2)}
    assert ends[0].state == "failed" and ends[0].error == "the disk is full\n  and so is the other one"
    assert ends[1].state == "finished" and trials.has_room


def test_one_that_cannot_begin_is_a_failure(tmp_path):
    (tmp_path / trial(tmp_path).label).write_text("a file where the folder should be")
    trials = pool()
    trials.start(trial(tmp_path))
    assert end_of(trials)[0].state == "failed"


def test_damaged_scores_are_a_failure_that_names_the_file(tmp_path):
    trials = pool()
    trials.start(trial(tmp_path))
    end_of(trials)
    for scores in tmp_path.glob("*/artifacts/score_*/scores.json"):
        scores.write_text("{}")
    trials.start(trial(tmp_path))
    damaged = end_of(trials)[0]
    assert damaged.state == "failed" and "scores.json" in damaged.error


def test_a_killed_controller_is_a_failure_with_its_signal(tmp_path):
    trials = pool()
    trials.start(trial(tmp_path, 0, NEVER_ENDS))
    next(iter(trials.members.values())).process.kill()
    assert "SIGKILL" in end_of(trials)[0].error


def test_stopping_lets_them_save(tmp_path):
    trials = pool()
    trials.start(trial(tmp_path, 0, NEVER_ENDS))
    wait_until(trial(tmp_path).run.journal.exists)
    trials.stop()
    assert not trials.has_room
    assert [end.state for end in end_of(trials)] == ["stopped"]
    assert not trial(tmp_path).run.lease.exists()


def test_another_controller_is_waited_for(tmp_path):
    trials = pool()
    waiting = trial(tmp_path)
    waiting.run.root.mkdir()
    with hold_lease(waiting.run):
        trials.start(waiting)
        assert not trials.poll(0.5) and trials.members[waiting.label].process is None
        assert not waiting.run.journal.exists()
    assert end_of(trials)[0].state == "finished"


def test_a_run_that_another_controller_has_finished_is_not_run_again(tmp_path):
    trials = pool()
    waiting = trial(tmp_path)
    waiting.run.save_config(waiting.config)
    with hold_lease(waiting.run):
        trials.start(waiting)
        code = "import sys; from pathlib import Path; from orchestrator.run.run_folder import RunFolder\n"
        code += "from tests.orchestrator.sweeps.fake_trial import walk; walk(RunFolder(Path(sys.argv[1])))"
        subprocess.run([sys.executable, "-c", code, str(waiting.run.root)], check=True)
    assert end_of(trials)[0].state == "finished"
    assert [event["event"] for event in waiting.run.events()].count("run_started") == 1


def test_a_trial_has_the_environment_that_it_was_given(tmp_path):
    seen = tmp_path / "seen"
    code = f"import json, os; open({str(seen)!r}, 'w').write(json.dumps(dict(os.environ)))"
    trials = TrialPool(lambda: 1, lambda: {"ONLY": "this"}, METRIC, lambda trial: [sys.executable, "-I", "-c", code])
    trials.start(trial(tmp_path))
    end_of(trials)
    assert set(json.loads(seen.read_text())) <= {"ONLY", "LC_CTYPE"}


def test_no_trial_outlives_a_killed_sweep(tmp_path):
    code = (
        "import os, sys, time; from pathlib import Path\n"
        "from tests.orchestrator.sweeps.fake_sweep import *\n"
        "pool = TrialPool(lambda: 1, lambda: os.environ, METRIC, command)\n"
        "pool.start(trial_in(Path(sys.argv[1]), 0, {'expert.training.lr': '0.001'}, 2))\n"
        "time.sleep(600)"
    )
    sweep = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    lease = trial(tmp_path).run.lease
    wait_until(lease.exists)
    child = json.loads(lease.read_text())["pid"]
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    try:
        wait_until(lambda: not _runs(child), "the end of the trial", limit_s=20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def _runs(pid) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("parallel", [1, 3])
def test_no_more_than_asked_for_run_at_once(tmp_path, parallel):
    trials = pool(parallel)
    waiting = [trial(tmp_path, number) for number in range(5)]
    most = 0
    while waiting or not trials.is_idle:
        while waiting and trials.has_room:
            trials.start(waiting.pop())
        most = max(most, sum(member.process is not None for member in trials.members.values()))
        trials.poll(0.2)
    assert most == parallel
