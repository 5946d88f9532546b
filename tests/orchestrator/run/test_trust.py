"""Run folders of strangers: no command acts on their settings, follows their links or kills by their word."""

import io
import json
import os
import subprocess
import sys
import time

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ddm_core.artifacts import write_json
from orchestrator.cli.app import app
from orchestrator.config.compute import ComputeConfig, IslandConfig
from orchestrator.config.schema import RunConfig
from orchestrator.controller import run_pipeline
from orchestrator.errors import ConfigError, RunFolderError, UntrustedFolder
from orchestrator.run.lease import this_process
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.runner import kill_orphan_workers
from orchestrator.run.trust import is_trusted, require_plain_files, require_trust
from orchestrator.run.worker_lock import hold_worker_lock, is_worker
from tests.orchestrator.fakes import diamond

ISLAND = IslandConfig(address="http://127.0.0.1:9", token_file="~/.netrc", storage="/tmp/storage")


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run")


@pytest.fixture
def foreign(run, monkeypatch, tmp_path):
    """Return a run folder whose configuration another user has written, with an island of theirs."""
    monkeypatch.setenv("DDM_HOME", str(tmp_path / "their home"))
    run.save_config(RunConfig(compute=ComputeConfig(backend="islands", islands={"theirs": ISLAND})))
    monkeypatch.setenv("DDM_HOME", str(tmp_path / "our home"))
    return run


def test_own_configuration_is_trusted_also_when_copied(run, tmp_path):
    run.save_config(RunConfig())
    assert is_trusted(run)
    run.root.rename(tmp_path / "moved")
    assert is_trusted(RunFolder(tmp_path / "moved"))


def test_changed_configuration_is_not_trusted(run):
    run.save_config(RunConfig())
    signature = run.signature.read_bytes()
    run.save_config(RunConfig(seed=1))
    run.signature.write_bytes(signature)
    assert not is_trusted(run)


def test_signing_key_is_private(run, tmp_path, monkeypatch):
    monkeypatch.setenv("DDM_HOME", str(tmp_path / "home"))
    run.save_config(RunConfig())
    key = tmp_path / "home" / "signing.key"
    assert key.stat().st_mode & 0o777 == 0o600 and key.parent.stat().st_mode & 0o777 == 0o700
    assert key.read_bytes().hex() not in run.signature.read_text()


@pytest.mark.parametrize("command", [["resume"], ["compress"]])
def test_foreign_run_is_refused_with_what_it_would_do(foreign, command):
    result = CliRunner().invoke(app, [command[0], str(foreign.root), *command[1:]])
    assert isinstance(result.exception, UntrustedFolder)
    message = str(result.exception)
    assert "send the token in" in message and ISLAND.address in message and "--trust" in message


def test_trust_flag_signs_the_folder(foreign):
    with pytest.raises(UntrustedFolder):
        require_trust(foreign, foreign.load_config(), trust=False)
    require_trust(foreign, foreign.load_config(), trust=True)
    assert is_trusted(foreign)


def test_foreign_run_can_be_read(foreign):
    assert CliRunner().invoke(app, ["status", str(foreign.root)]).exit_code == 0


@pytest.mark.parametrize("place", ["artifacts", "work/expert_0-0123456789ab/state/x.npy", "controllers/9.json"])
@pytest.mark.parametrize("kind", ["link", "hard link", "pipe"])
def test_foreign_run_leading_outside_is_not_written(foreign, tmp_path, place, kind):
    path, outside = foreign.root / place, tmp_path / "bashrc"
    outside.write_text("alias ll=ls\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    make = {"link": lambda: path.symlink_to(outside), "hard link": lambda: path.hardlink_to(outside)}
    make.get(kind, lambda: os.mkfifo(path))()
    for command in (["resume", "--trust"], ["resume"], ["audit"]):
        result = CliRunner().invoke(app, [command[0], str(foreign.root), *command[1:]])
        assert isinstance(result.exception, UntrustedFolder | RunFolderError)
    with pytest.raises(UntrustedFolder, match=path.name):
        run_pipeline(RunConfig(folder=str(foreign.root)), Console(file=io.StringIO()))
    assert outside.read_text() == "alias ll=ls\n" and not is_trusted(foreign)


def test_links_of_own_runs_are_followed(foreign, tmp_path, monkeypatch):
    (foreign.root / "latest").symlink_to("config.yaml")
    require_plain_files(foreign)
    foreign.save_config(RunConfig())
    (foreign.root / "artifacts").symlink_to(tmp_path)
    require_plain_files(foreign)


def test_clearing_deletes_only_names_of_our_form(run, tmp_path):
    scratch = tmp_path / "scratch"
    for name in (
        ".cache",
        ".ssh",
        ".expert_0-0123456789ab",
        ".expert_0-0123456789ab.12",
        ".score_0.05-0123456789ab.7",
        "..score-0123456789ab.7.7",
    ):
        (scratch / name).mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (scratch / ".linked-0123456789ab.5").symlink_to(tmp_path / "elsewhere")
    run.root.mkdir()
    (run.root / "artifacts").symlink_to(scratch)
    run.clear_unfinished()
    remaining = {path.name for path in scratch.iterdir()}
    assert remaining == {".cache", ".ssh", ".expert_0-0123456789ab", ".linked-0123456789ab.5"}
    assert (tmp_path / "elsewhere").is_dir()


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder"])
@pytest.mark.parametrize("name", ["journal.jsonl", "stop"])
def test_write_through_a_special_file_is_refused(run, tmp_path, kind, name):
    run.root.mkdir()
    target = tmp_path / "bashrc"
    target.write_text("alias ll=ls\nunfinished line")
    path = run.root / name
    {"link": lambda: path.symlink_to(target), "hard link": lambda: path.hardlink_to(target)}.get(
        kind, lambda: os.mkfifo(path) if kind == "pipe" else path.mkdir()
    )()
    actions = (lambda: run.record("x"), run.repair_journal) if name == "journal.jsonl" else (run.request_stop,)
    for action in actions:
        with pytest.raises(RunFolderError, match="regular file"):
            action()
    assert target.read_text() == "alias ll=ls\nunfinished line"


def test_every_damage_of_the_configuration_is_named(run):
    run.save_config(RunConfig(name="sealed"))
    contents = run.config_file.read_bytes()
    for place in (*range(0, 80, 10), *range(80, len(contents), len(contents) // 20)):
        for damaged in (contents[:place], contents[:place] + bytes([contents[place] ^ 4]) + contents[place + 1 :]):
            run.config_file.write_bytes(damaged)
            with pytest.raises((RunFolderError, ConfigError)):
                run.load_config()
    run.config_file.write_bytes(contents)
    assert run.load_config().name == "sealed"


def start_process() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def record_worker(run, stage, pid: int):
    attempt = run.attempt(stage, 1)
    from orchestrator.run.lease import process_start_time

    write_json(attempt / "worker.json", this_process() | {"pid": pid, "started": process_start_time(pid)})
    return attempt


def test_forged_worker_is_left_alone(run):
    victim, stage = start_process(), diamond()[0]
    try:
        attempt = record_worker(run, stage, victim.pid)
        (attempt / "worker.lock").touch()
        kill_orphan_workers(run, [stage])
        time.sleep(0.2)
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_lock_names_its_process_alone(tmp_path):
    other = start_process()
    try:
        with hold_worker_lock(tmp_path):
            assert is_worker(os.getpid(), tmp_path) and not is_worker(other.pid, tmp_path)
        assert not is_worker(os.getpid(), tmp_path)
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("value", ["x\nrm -rf ~", "x\r", "\x1b[31m", "a\0b"])
def test_slurm_value_with_control_characters_is_refused(value):
    with pytest.raises(ValueError, match="control characters"):
        ComputeConfig(backend="slurm", slurm={"slurm_comment": value})


def test_stop_of_a_dead_controller_is_an_error(run):
    run.save_config(RunConfig())
    run.controllers.mkdir()
    (run.controllers / "1.json").write_text(json.dumps(this_process() | {"started": "1"}))
    result = CliRunner().invoke(app, ["stop", str(run.root)])
    assert isinstance(result.exception, RunFolderError) and "is dead" in str(result.exception)
    assert not run.stop.exists()
