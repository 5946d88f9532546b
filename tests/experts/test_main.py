import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ddm_core import artifacts
from ddm_core.artifacts import files_in, read_manifest, write_json
from experts.__main__ import main

CONFIG = {
    "network": {"kind": "residual_mlp", "width": 64, "depth": 2},
    "training": {"steps": 800, "batch_size": 64, "log_every": 20, "checkpoint_every": 50},
}


def command(shards, folder, out, config=CONFIG):
    write_json(folder / "config.json", config)
    arguments = ["--shards", shards, "--codec", folder / "codec", "--out", out, "--config", folder / "config.json"]
    return [sys.executable, "-m", "experts", *map(str, arguments)]


def started(arguments):
    path = os.pathsep.join([str(Path(artifacts.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)


def finished(arguments):
    process = started(arguments)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


@pytest.fixture
def pixels(tmp_path):
    write_json(tmp_path / "codec" / "codec.json", {"kind": "pixels", "image_shape": [4, 4, 1]})


@pytest.fixture
def one_thread():
    """What OMP_NUM_THREADS=1 gives a process of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def content(folder):
    return {path.name: path.read_bytes() for path in files_in(folder)}


def wait_for(found, process):
    while not found():
        assert process.poll() is None, "the training ended before it could be killed"
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_and_started_again_gives_the_same_bytes(shards, tmp_path, pixels):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finished(command(shards, tmp_path, whole))[0] == 0
    checkpoints = tmp_path / "killed.work" / "checkpoints"
    for least in (100, 400):
        process = started(command(shards, tmp_path, killed))
        wait_for(lambda least=least: any(checkpoints.glob("step-*")) and newest(checkpoints) >= least, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not killed.exists()
    assert finished(command(shards, tmp_path, killed))[0] == 0
    assert content(killed) == content(whole)
    assert read_manifest(killed).checksums == read_manifest(whole).checksums


def newest(checkpoints):
    return max(int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*"))


MOMENTS = {
    "importing": lambda work: True,
    "encoding": lambda work: (work / "attempt_1").exists(),
    "saving": lambda work: any((work / "checkpoints").glob(".step-*")),
}
"""When SIGTERM comes: as soon as this is true of the work folder."""


@pytest.mark.slow
def test_sigterm_at_any_moment_costs_no_step_and_no_byte(shards, tmp_path, pixels, monkeypatch, one_thread):
    """Three trainings at once, so that the signals also come at moments that no predicate names."""
    config = {**CONFIG, "training": {**CONFIG["training"], "steps": 500, "checkpoint_every": 20}}
    commands = {moment: command(shards, tmp_path, tmp_path / moment, config) for moment in MOMENTS}
    processes = {moment: started(arguments) for moment, arguments in commands.items()}
    signal_each(processes, tmp_path)
    for moment in MOMENTS:
        said = next((line for line in processes[moment].stderr if "stopped" in line), "")
        processes[moment].send_signal(signal.SIGTERM)  # a second one, while the process ends
        said += processes[moment].communicate(timeout=60)[1]
        killed = moment == "importing" and processes[moment].returncode == -signal.SIGTERM
        assert killed or processes[moment].returncode == 75, f"{moment}: {processes[moment].returncode} {said}"
        check_nothing_is_lost(tmp_path / f"{moment}.work", said)
        assert not (tmp_path / moment).exists()
    commands["undisturbed"] = command(shards, tmp_path, tmp_path / "undisturbed", config)
    for moment, arguments in reversed(commands.items()):
        monkeypatch.setattr(sys, "argv", arguments[2:])
        assert main() == 0
        assert content(tmp_path / moment) == content(tmp_path / "undisturbed"), moment


def signal_each(processes, folder):
    """Send SIGTERM to every process at its moment."""
    waiting = dict(MOMENTS)
    time.sleep(random.uniform(0.1, 1.0))
    while waiting:
        for moment, has_come in list(waiting.items()):
            assert processes[moment].poll() is None, f"{moment}: it ended before its signal"
            if has_come(folder / f"{moment}.work"):
                processes[moment].send_signal(signal.SIGTERM)
                del waiting[moment]


def check_nothing_is_lost(work, said):
    """The only checkpoint is whole, and of the very step at which the training says it stopped."""
    found = list((work / "checkpoints").glob("*"))
    if "stopped at step" not in said:
        assert not found
        return
    assert [path.name for path in found] == [f"step-{int(said.split('stopped at step ')[1].split()[0]):08d}"]
    state = artifacts.read_with_checksum(found[0] / "state.json")
    assert state["sha256"] == artifacts.checksum(found[0] / "state.safetensors")
    rows = (work / "attempt_1" / "metrics.jsonl").read_text().splitlines()
    assert state["step"] >= max((json.loads(row)["step"] for row in rows), default=0)


@pytest.mark.slow
def test_asked_to_stop_it_says_so_with_its_exit_code(shards, tmp_path, pixels):
    (tmp_path / "expert.work").mkdir()
    (tmp_path / "expert.work" / "stop").touch()
    code, errors = finished(command(shards, tmp_path, tmp_path / "expert"))
    assert code == 75
    assert "start it again to continue" in errors


@pytest.mark.slow
def test_mistakes_are_one_message_without_a_traceback(shards, tmp_path, pixels):
    code, errors = finished(command(shards, tmp_path, tmp_path / "expert", {"training": {"stepps": 3}}))
    assert code == 1
    assert "stepps" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_finished_expert_is_kept_and_never_mistaken_for_another(shards, tmp_path, pixels):
    short = {**CONFIG, "training": {"steps": 3, "batch_size": 4}}
    arguments = command(shards, tmp_path, tmp_path / "expert", short)
    assert finished(arguments)[0] == 0
    before = content(tmp_path / "expert")
    assert finished(arguments)[0] == 0
    code, errors = finished(command(shards, tmp_path, tmp_path / "expert", {**short, "prediction": "noise"}))
    assert code == 1
    assert "another configuration" in errors
    code, errors = finished([*arguments, "--cluster-id", "1"])
    assert code == 1 and "other data" in errors
    assert content(tmp_path / "expert") == before


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_trains_as_well(shards, tmp_path, pixels):
    """In a process of its own: the shape checks of the test run cannot be compiled."""
    losses = []
    for compiled in (False, True):
        out = tmp_path / f"compiled_{compiled}"
        config = {**CONFIG, "training": {"steps": 30, "batch_size": 16, "compile": compiled}}
        assert finished(command(shards, tmp_path, out, config))[0] == 0
        losses.append(json.loads((out / "training.json").read_text())["final_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
