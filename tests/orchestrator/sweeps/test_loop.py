"""A sweep that is killed repeatedly, stopped, and started twice at the same time."""

import json
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from orchestrator.errors import RunFailed
from orchestrator.run.lease import read_holder
from orchestrator.run.run_folder import RunFolder
from orchestrator.sweeps.loop import raise_if_incomplete
from orchestrator.sweeps.trial import SweepStopped, SweepTrial, TrialEnd
from tests.orchestrator.sweeps.test_trial_pool import wait_until

pytestmark = pytest.mark.integration
N = 4


def start_sweep(folder: Path, parallel: int = 1) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.orchestrator.sweeps.fake_sweep", str(folder), str(N), str(parallel)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def summary(folder: Path) -> dict:
    return json.loads((folder / "sweep" / "sweep.json").read_text())


def journals(folder: Path) -> dict[str, list[dict]]:
    paths = sorted(folder.glob("*/journal.jsonl"))
    return {path.parent.name: [json.loads(line) for line in path.read_text().splitlines()] for path in paths}


def count_journal_lines(folder: Path) -> int:
    """Count the journal's lines so far."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*/journal.jsonl"))


def _has_journal_lines(running: subprocess.Popen, folder: Path, lines: int) -> bool:
    return running.poll() is not None or count_journal_lines(folder) >= lines


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    output, _ = start_sweep(folder).communicate(timeout=120)
    assert len(summary(folder)["trials"]) == N, output
    return folder


def test_sweep_killed_at_random_has_equal_results_without_reruns(undisturbed, tmp_path):
    rng, lines, kills = random.Random(5), 0, 0
    while True:
        running = start_sweep(tmp_path)
        lines += rng.randint(5, 30)
        wait_until(partial(_has_journal_lines, running, tmp_path, lines))
        running.kill()
        output, _ = running.communicate()
        if running.returncode != -signal.SIGKILL:
            break
        kills += 1
    assert running.returncode == 0, output
    assert kills >= 3
    assert summary(tmp_path) == summary(undisturbed)
    for label, events in journals(tmp_path).items():
        finished = [event["stage"] for event in events if event["event"] == "finished"]
        assert len(finished) == len(set(finished)), label
    assert journals(tmp_path).keys() == journals(undisturbed).keys()


def test_finished_sweep_starts_nothing(undisturbed):
    before = journals(undisturbed)
    assert start_sweep(undisturbed).wait(timeout=60) == 0
    assert journals(undisturbed) == before


def test_parallel_sweep_runs_every_trial(tmp_path):
    running = start_sweep(tmp_path, parallel=3)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 0, output
    assert [entry["number"] for entry in summary(tmp_path)["trials"]] == list(range(N))
    assert (tmp_path / "sweep" / "sweep.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signal_stops_all_trials(tmp_path, number):
    running = start_sweep(tmp_path)
    wait_until(lambda: count_journal_lines(tmp_path))
    running.send_signal(number)
    output, _ = running.communicate(timeout=60)
    assert "SweepStopped" in output and "the same command continues" in output
    assert count_journal_lines(tmp_path) and not any(read_holder(RunFolder(folder)) for folder in tmp_path.glob("*"))


def test_second_sweep_in_a_folder_is_rejected(tmp_path):
    first = start_sweep(tmp_path)
    wait_until(lambda: read_holder(RunFolder(tmp_path / "sweep")) is not None)
    second = start_sweep(tmp_path)
    output, _ = second.communicate(timeout=60)
    assert "RunIsLocked" in output and f"process {first.pid}" in output
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)


def test_all_failed_trials_are_reported():
    ends = [
        TrialEnd(
            trial=SweepTrial(number=number, label=f"a={number}", config=None), state=state, error=f"error {number}"
        )
        for number, state in enumerate(["failed", "finished", "failed"])
    ]
    with pytest.raises(RunFailed, match=r"2 of 3.*\n  a=0: error 0\n  a=2: error 2"):
        raise_if_incomplete(ends)
    with pytest.raises(SweepStopped, match="1 trial"):
        raise_if_incomplete(ends[1:2], unstarted=1)
    raise_if_incomplete(ends[1:2])
