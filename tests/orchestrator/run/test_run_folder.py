"""The run folder: a journal that survives crashes, a format version, and a lease that only one controller holds."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from ddm_core.artifacts import CorruptArtifact
from orchestrator.config.schema import RunConfig
from orchestrator.errors import RunFolderError, RunIsLocked
from orchestrator.pipeline.graph import build_graph
from orchestrator.run.lease import LEASE_S, hold_lease, is_alive, read_holder, this_process
from orchestrator.run.run_folder import FORMAT, RunFolder


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path)


def test_journal_keeps_events_in_order(run):
    for number in range(5):
        run.record("submitted", attempt=number)
    assert [event["attempt"] for event in run.read_events()] == list(range(5))


def test_journal_with_torn_last_line_is_repaired(run):
    run.record("submitted", attempt=1)
    with run.journal.open("a") as file:
        file.write('{"event": "fini')
    assert len(run.read_events()) == 1
    run.repair_journal()
    run.record("submitted", attempt=2)
    assert [event["attempt"] for event in run.read_events()] == [1, 2]


def test_journal_with_broken_line_names_it(run):
    run.journal.write_text('{"event": "a"}\nnonsense\n{"event": "b"}\n')
    with pytest.raises(CorruptArtifact, match="line 2"):
        run.read_events()


def test_journal_names_every_flipped_bit(run):
    run.record("submitted", stage="expert_0", attempt=1)
    run.record("moved", stage="expert_0", bytes=12, direction="in")
    content, events = run.journal.read_bytes(), run.read_events()
    for place in range(len(content) - 1):
        for bit in range(8):
            run.journal.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            try:
                facts = [{key: event[key] for key in ("event", "time", "stage")} for event in run.read_events()]
            except CorruptArtifact as error:
                assert "journal.jsonl, line" in str(error)
            else:
                assert facts == [{key: event[key] for key in ("event", "time", "stage")} for event in events]


@pytest.mark.parametrize("line", ["7", "{}", '{"event": 7}', '{"event": "moved", "bytes": "many"}', "[" * 100_000])
def test_journal_with_another_shape_names_the_line(run, line):
    run.journal.write_text(f'{line}\n{{"event": "b"}}\n')
    with pytest.raises(CorruptArtifact, match="line 1"):
        run.read_events()


def test_config_saved_and_loaded_is_equal(run):
    config = RunConfig(name="x", folder=str(run.root))
    run.save_config(config)
    assert run.load_config() == config


def test_config_with_format_keeps_fingerprints(run):
    config = RunConfig(name="x", folder=str(run.root))
    run.save_config(config)
    contents = yaml.safe_load((run.root / "config.yaml").read_text())
    assert next(iter(contents)) == "format" and contents["format"] == FORMAT
    stages = {stage.name: stage.fingerprint for stage in build_graph(config)}
    assert {stage.name: stage.fingerprint for stage in build_graph(run.load_config())} == stages


OLD_CONFIGS = (
    "name: x\n",
    "name: x\nbaselines: [told, student]\nexpert: {path: cosine}\n",
    "name: x\nswitch: {method: small_early}\nspot_losses: 2\n",
    "format: 1\nname: x\n",
)


@pytest.mark.parametrize("text", OLD_CONFIGS)
def test_run_of_earlier_version_is_one_clear_error(run, text):
    (run.root / "config.yaml").write_text(text)
    message = rf"{run.root} was written by an earlier version of ddm \(format 1; this version reads 2\): start a new"
    with pytest.raises(RunFolderError, match=message):
        run.load_config()
    with pytest.raises(RunFolderError, match=message):
        run.save_config(RunConfig())
    assert (run.root / "config.yaml").read_text() == text


def test_run_of_later_version_is_one_clear_error(run):
    (run.root / "config.yaml").write_text("format: 3\nname: x\n")
    with pytest.raises(RunFolderError, match=r"written by a later version of ddm \(format 3; this version reads 2\)"):
        run.load_config()


def test_config_that_is_unreadable_is_written_again(run):
    (run.root / "config.yaml").write_text("a: [")
    run.save_config(RunConfig(name="x"))
    assert run.load_config().name == "x"


def test_load_config_without_run_is_an_error(run):
    with pytest.raises(RunFolderError, match="ddm run"):
        run.load_config()


def test_lease_of_live_controller_blocks_another(run):
    with hold_lease(run), pytest.raises(RunIsLocked, match=str(os.getpid())), hold_lease(run):
        pass
    assert read_holder(run) is None


def test_lease_of_killed_controller_is_free(run):
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
        assert read_holder(run).process["pid"] == os.getpid()


@pytest.mark.slow
def test_lease_with_many_controllers_is_held_once(run):
    code = (
        "import sys, time; from pathlib import Path; from orchestrator.errors import RunIsLocked\n"
        "from orchestrator.run.lease import hold_lease; from orchestrator.run.run_folder import RunFolder\n"
        "time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
        "try:\n"
        "    with hold_lease(RunFolder(Path(sys.argv[1]))): print('held', flush=True); time.sleep(2)\n"
        "except RunIsLocked: print('refused')\n"
    )
    command = [sys.executable, "-c", code, str(run.root), str(time.time() + 2)]
    controllers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert sorted(racer.communicate()[0] for racer in controllers) == ["held\n", "refused\n", "refused\n", "refused\n"]


@pytest.mark.parametrize("location", [{"host": "another-host"}, {"pids": "pid:[1]"}])
def test_controller_elsewhere_is_dead_after_its_lease(run, location):
    controller = this_process() | location | {"started": "1"}
    assert is_alive(controller, heartbeat_s=LEASE_S - 1)
    assert not is_alive(controller, heartbeat_s=LEASE_S + 1)


def test_reused_pid_is_another_process(run):
    assert is_alive(this_process(), 0.0)
    assert not is_alive(this_process() | {"started": "1"}, 0.0)


def test_heartbeat_touches_the_lease(run, monkeypatch):
    monkeypatch.setattr("orchestrator.run.lease.HEARTBEAT_S", 0.05)
    with hold_lease(run) as lease:
        os.utime(run.controllers / f"{lease.generation}.json", (0, 0))
        time.sleep(0.3)
        assert read_holder(run).age_s < 5
