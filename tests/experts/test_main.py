import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data_partition.shards.shards import Sample, ShardWriter
from ddm_core import artifacts
from ddm_core.artifacts import list_files, read_manifest, write_json
from ddm_core.files.checksums import checksum
from experts.__main__ import main
from experts.conditions.null_text import get_null_text
from experts.conditions.text_encoder import TextEncoder
from experts.config import TextConfig
from experts.expert import Expert
from tests.text_encoders import save_tiny_encoder

CONFIG = {
    "network": {"kind": "residual_mlp", "width": 64, "depth": 2},
    "training": {"steps": 800, "batch_size": 64, "log_every": 20, "checkpoint_every": 50},
}


def command(shards, folder, out, config=CONFIG):
    write_json(folder / "config.json", config)
    arguments = ["--shards", shards, "--codec", folder / "codec", "--out", out, "--config", folder / "config.json"]
    return [sys.executable, "-m", "experts", *map(str, arguments)]


def start_process(arguments):
    path = os.pathsep.join([str(Path(artifacts.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True)


def run_process(arguments):
    process = start_process(arguments)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


@pytest.fixture
def pixels(tmp_path):
    write_json(tmp_path / "codec" / "codec.json", {"kind": "pixels", "image_shape": [4, 4, 1]})


@pytest.fixture
def one_thread():
    """Run with one thread, as OMP_NUM_THREADS=1 does in a subprocess."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def content(folder):
    return {path.name: path.read_bytes() for path in list_files(folder)}


def wait_for(is_reached, process):
    while not is_reached():
        assert process.poll() is None, "the training ended before it could be killed"
        time.sleep(0.01)


@pytest.mark.integration
def test_restart_after_sigkill_is_byte_identical(shards, tmp_path, pixels):
    uninterrupted, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_process(command(shards, tmp_path, uninterrupted))[0] == 0
    checkpoints = tmp_path / "killed.work" / "checkpoints"
    for min_step in (100, 400):
        process = start_process(command(shards, tmp_path, killed))
        wait_for(lambda min_step=min_step: any(checkpoints.glob("step-*")) and newest(checkpoints) >= min_step, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not killed.exists()
    assert run_process(command(shards, tmp_path, killed))[0] == 0
    assert content(killed) == content(uninterrupted)
    assert read_manifest(killed).checksums == read_manifest(uninterrupted).checksums


def newest(checkpoints):
    return max(int(path.name.removeprefix("step-")) for path in checkpoints.glob("step-*"))


MOMENTS = {
    "importing": lambda work: True,
    "encoding": lambda work: (work / "attempt_1").exists(),
    "saving": lambda work: any((work / "checkpoints").glob(".step-*")),
}
"""SIGTERM is sent as soon as the predicate of the work folder is true."""


@pytest.mark.integration
def test_sigterm_at_any_moment_loses_no_step(shards, tmp_path, pixels, monkeypatch, one_thread):
    """Run three trainings at once, so that signals also arrive at moments that no predicate names."""
    config = {**CONFIG, "training": {**CONFIG["training"], "steps": 500, "checkpoint_every": 20}}
    commands = {moment: command(shards, tmp_path, tmp_path / moment, config) for moment in MOMENTS}
    processes = {moment: start_process(arguments) for moment, arguments in commands.items()}
    signal_each(processes, tmp_path)
    for moment in MOMENTS:
        log = next((line for line in processes[moment].stderr if "stopped" in line), "")
        processes[moment].send_signal(signal.SIGTERM)  # a second one, while the process ends
        log += processes[moment].communicate(timeout=60)[1]
        killed = moment == "importing" and processes[moment].returncode == -signal.SIGTERM
        assert killed or processes[moment].returncode == 75, f"{moment}: {processes[moment].returncode} {log}"
        check_checkpoint(tmp_path / f"{moment}.work", log)
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
        for moment, is_due in list(waiting.items()):
            assert processes[moment].poll() is None, f"{moment}: it ended before its signal"
            if is_due(folder / f"{moment}.work"):
                processes[moment].send_signal(signal.SIGTERM)
                del waiting[moment]


def check_checkpoint(work, log):
    """Check that the only checkpoint is complete, and of the step at which the log reports the stop."""
    checkpoints = list((work / "checkpoints").glob("*"))
    if "stopped at step" not in log:
        assert not checkpoints
        return
    assert [path.name for path in checkpoints] == [f"step-{int(log.split('stopped at step ')[1].split()[0]):08d}"]
    state = artifacts.read_with_checksum(checkpoints[0] / "state.json")
    assert state["sha256"] == checksum(checkpoints[0] / "state.safetensors")
    rows = (work / "attempt_1" / "metrics.jsonl").read_text().splitlines()
    assert state["step"] >= max((json.loads(row)["step"] for row in rows), default=0)


@pytest.mark.slow
def test_stop_request_exits_with_code_75(shards, tmp_path, pixels):
    (tmp_path / "expert.work").mkdir()
    (tmp_path / "expert.work" / "stop").touch()
    code, errors = run_process(command(shards, tmp_path, tmp_path / "expert"))
    assert code == 75
    assert "run the same command again to continue" in errors


@pytest.mark.slow
def test_config_error_is_one_message_without_traceback(shards, tmp_path, pixels):
    code, errors = run_process(command(shards, tmp_path, tmp_path / "expert", {"training": {"stepps": 3}}))
    assert code == 1
    assert "stepps" in errors
    assert "Traceback" not in errors


@pytest.mark.integration
def test_finished_expert_is_never_overwritten(shards, tmp_path, pixels):
    short = {**CONFIG, "training": {"steps": 3, "batch_size": 4}}
    arguments = command(shards, tmp_path, tmp_path / "expert", short)
    assert run_process(arguments)[0] == 0
    before = content(tmp_path / "expert")
    assert run_process(arguments)[0] == 0
    code, errors = run_process(command(shards, tmp_path, tmp_path / "expert", {**short, "prediction": "noise"}))
    assert code == 1
    assert "another configuration" in errors
    code, errors = run_process([*arguments, "--cluster-id", "1"])
    assert code == 1 and "other data" in errors
    assert content(tmp_path / "expert") == before


@pytest.mark.integration
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_network_reaches_the_same_loss(shards, tmp_path, pixels):
    """Run in a subprocess, because the shape checks of the test run cannot be compiled."""
    losses = []
    for compiled in (False, True):
        out = tmp_path / f"compiled_{compiled}"
        config = {**CONFIG, "training": {"steps": 30, "batch_size": 16, "compile": compiled}}
        assert run_process(command(shards, tmp_path, out, config))[0] == 0
        losses.append(json.loads((out / "training.json").read_text())["final_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.slow
def test_captions_of_shards_are_read_with_a_text_encoder(pixels, one_thread, tmp_path, monkeypatch, capsys):
    writer, encoder = ShardWriter(tmp_path / "shards", 16), save_tiny_encoder(tmp_path / "encoder", "transformers")
    for number in range(20):
        image = np.full((4, 4, 1), 12 * number, np.uint8)
        writer.add(Sample(key=str(number), image=image, caption=f"a {('dark', 'light')[number > 9]} boot"))
    writer.close()
    text = TextEncoder.from_config(TextConfig(kind="transformers", path=str(encoder), length=5))
    (tmp_path / "ensemble").mkdir()
    text.save(tmp_path / "ensemble")
    config = CONFIG | {"training": {"steps": 4, "batch_size": 4}}
    arguments = command(tmp_path / "shards", tmp_path, tmp_path / "expert", config)
    capsys.readouterr()

    def run_here(*more):
        monkeypatch.setattr(sys, "argv", [*arguments[2:], *more])
        return main(), capsys.readouterr().err

    assert run_here("--text", str(tmp_path / "shards")) == (
        1,
        f"--text {tmp_path / 'shards'} has no text_encoder.json; name the folder of an ensemble with text\n",
    )
    assert run_here("--text", str(tmp_path / "ensemble"))[0] == 0
    assert get_null_text(Expert.load(tmp_path / "expert").model).shape == (5, 8, 8)
    assert "holds an expert of another configuration" in run_here()[1]
