import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import artifacts
from artifacts import files_in, read_manifest, write_json

CONFIG = {
    "network": {"kind": "residual_mlp", "width": 64, "depth": 2},
    "training": {"steps": 800, "batch_size": 64, "log_every": 20, "checkpoint_every": 50},
}


def command(shards, folder, out, config=CONFIG):
    write_json(folder / "config.json", config)
    arguments = ["--shards", shards, "--codec", folder / "codec", "--out", out, "--config", folder / "config.json"]
    return [sys.executable, "-m", "experts", *map(str, arguments)]


def started(arguments):
    path = os.pathsep.join([str(Path(artifacts.__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)


def finished(arguments):
    process = started(arguments)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


@pytest.fixture
def pixels(tmp_path):
    write_json(tmp_path / "codec" / "codec.json", {"kind": "pixels", "image_shape": [4, 4, 1]})


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
