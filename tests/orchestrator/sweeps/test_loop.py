"""A sweep that is killed again and again, and stopped, and run twice at once."""

import json
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from orchestrator.errors import RunFailed
from orchestrator.sweeps.loop import finish_sweep
from orchestrator.sweeps.trial import SweepStopped, SweepTrial, TrialEnd
from tests.orchestrator.sweeps.test_trial_pool import wait_until

pytestmark = pytest.mark.slow
N = 4


def sweep(folder: Path, parallel: int = 1) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.orchestrator.sweeps.fake_sweep", str(folder), str(N), str(parallel)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def found(folder: Path) -> dict:
    return json.loads((folder / "sweep" / "sweep.json").read_text())


def journals(folder: Path) -> dict[str, list[dict]]:
    paths = sorted(folder.glob("*/journal.jsonl"))
    return {path.parent.name: [json.loads(line) for line in path.read_text().splitlines()] for path in paths}


def size(folder: Path) -> int:
    """How much has happened so far."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*/journal.jsonl"))


def _has_come_to(running: subprocess.Popen, folder: Path, lines: int) -> bool:
    return running.poll() is not None or size(folder) >= lines


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    said, _ = sweep(folder).communicate(timeout=120)
    assert len(found(folder)["trials"]) == N, said
    return folder


def test_killed_at_random_instants_it_finds_the_same_and_runs_nothing_twice(undisturbed, tmp_path):
    chance, lines, kills = random.Random(5), 0, 0
    while True:
        running = sweep(tmp_path)
        lines += chance.randint(5, 30)
        wait_until(partial(_has_come_to, running, tmp_path, lines))
        running.kill()
        said, _ = running.communicate()
        if running.returncode != -signal.SIGKILL:
            break
        kills += 1
    assert running.returncode == 0, said
    assert kills >= 3
    assert found(tmp_path) == found(undisturbed)
    for label, events in journals(tmp_path).items():
        finished = [event["stage"] for event in events if event["event"] == "finished"]
        assert len(finished) == len(set(finished)), label
    assert journals(tmp_path).keys() == journals(undisturbed).keys()


def test_run_once_more_it_starts_nothing(undisturbed):
    before = journals(undisturbed)
    assert sweep(undisturbed).wait(timeout=60) == 0
    assert journals(undisturbed) == before


def test_trials_at_once_are_as_many(tmp_path):
    running = sweep(tmp_path, parallel=3)
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 0, said
    assert [entry["number"] for entry in found(tmp_path)["trials"]] == list(range(N))
    assert (tmp_path / "sweep" / "sweep.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_stops_its_trials(tmp_path, number):
    running = sweep(tmp_path)
    wait_until(lambda: size(tmp_path))
    running.send_signal(number)
    said, _ = running.communicate(timeout=60)
    assert "SweepStopped" in said and "the same command goes on" in said
    assert size(tmp_path) and not list(tmp_path.glob("*/controller.json"))


def test_a_second_sweep_in_the_folder_is_refused(tmp_path):
    first = sweep(tmp_path)
    wait_until((tmp_path / "sweep" / "controller.json").exists)
    second = sweep(tmp_path)
    said, _ = second.communicate(timeout=60)
    assert "RunIsLocked" in said and f"process {first.pid}" in said
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=60)


def test_all_failures_are_named_at_the_end():
    ends = [
        TrialEnd(
            trial=SweepTrial(number=number, label=f"a={number}", config=None), state=state, error=f"error {number}"
        )
        for number, state in enumerate(["failed", "finished", "failed"])
    ]
    with pytest.raises(RunFailed, match=r"2 of 3.*\n  a=0: error 0\n  a=2: error 2"):
        finish_sweep(ends)
    with pytest.raises(SweepStopped, match="1 trial"):
        finish_sweep(ends[1:2], unstarted=1)
    finish_sweep(ends[1:2])
