"""The run folder: a journal that survives crashes, and a lease that only one controller holds."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ddm_core.artifacts import CorruptArtifact
from orchestrator.config.schema import RunConfig
from orchestrator.errors import RunFolderError, RunIsLocked
from orchestrator.run.lease import LEASE_S, hold_lease, is_alive, this_process
from orchestrator.run.run_folder import RunFolder


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path)


def test_the_journal_keeps_every_event_in_order(run):
    for number in range(5):
        run.record("submitted", attempt=number)
    assert [event["attempt"] for event in run.events()] == list(range(5))


def test_a_torn_last_line_is_left_out_and_cut_off(run):
    run.record("submitted", attempt=1)
    with run.journal.open("a") as file:
        file.write('{"event": "fini')
    assert len(run.events()) == 1
    run.repair_journal()
    run.record("submitted", attempt=2)
    assert [event["attempt"] for event in run.events()] == [1, 2]


def test_a_broken_line_in_the_middle_is_named(run):
    run.journal.write_text('{"event": "a"}\nnonsense\n{"event": "b"}\n')
    with pytest.raises(CorruptArtifact, match="line 2"):
        run.events()


def test_a_configuration_comes_back_from_the_folder(run):
    config = RunConfig(name="x", folder=str(run.root))
    run.save_config(config)
    assert run.load_config() == config


def test_a_folder_that_is_no_run_says_so(run):
    with pytest.raises(RunFolderError, match="ddm run"):
        run.load_config()


def test_a_second_controller_is_refused_and_told_who_the_first_is(run):
    with hold_lease(run), pytest.raises(RunIsLocked, match=str(os.getpid())), hold_lease(run):
        pass
    assert not run.lease.exists()


def test_the_lease_of_a_killed_controller_is_free(run):
    code = (
        "import sys, time; from pathlib import Path; from orchestrator.run.lease import hold_lease; "
        "from orchestrator.run.run_folder import RunFolder\n"
        "with hold_lease(RunFolder(Path(sys.argv[1]))): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(run.root)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(RunIsLocked, match=str(other.pid)), hold_lease(run):
        pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    other.stdout.close()
    with hold_lease(run):
        assert json.loads(run.lease.read_text())["pid"] == os.getpid()


@pytest.mark.slow
def test_of_many_controllers_at_once_one_gets_the_lease(run):
    code = (
        "import sys, time; from pathlib import Path; from orchestrator.errors import RunIsLocked\n"
        "from orchestrator.run.lease import hold_lease; from orchestrator.run.run_folder import RunFolder\n"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
        "try:\n"
        "    with hold_lease(RunFolder(Path(sys.argv[1]))): print('held', flush=True); time.sleep(2)\n"
        "except RunIsLocked: print('refused')\n"
    )
    command = [sys.executable, "-c", code, str(run.root), str(time.time() + 2)]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert sorted(racer.communicate()[0] for racer in racers) == ["held\n", "refused\n", "refused\n", "refused\n"]


@pytest.mark.parametrize("elsewhere", [{"host": "another-host"}, {"pids": "pid:[1]"}])
def test_a_controller_elsewhere_is_dead_only_after_its_lease(run, elsewhere):
    elsewhere = this_process() | elsewhere | {"started": "1"}
    assert is_alive(elsewhere, heartbeat_s=LEASE_S - 1)
    assert not is_alive(elsewhere, heartbeat_s=LEASE_S + 1)


def test_a_process_that_reuses_the_pid_is_another_process(run):
    assert is_alive(this_process(), 0.0)
    assert not is_alive(this_process() | {"started": "1"}, 0.0)


def test_the_heartbeat_beats(run, monkeypatch):
    monkeypatch.setattr("orchestrator.run.lease.HEARTBEAT_S", 0.05)
    with hold_lease(run):
        os.utime(run.lease, (0, 0))
        time.sleep(0.3)
        assert time.time() - run.lease.stat().st_mtime < 5
