"""Islands backend: real Ray clusters, real kills."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from ddm_core.artifacts import read_json, read_manifest
from orchestrator.config.compute import ComputeConfig
from orchestrator.config.finetune import FinetuneConfig
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.errors import IslandError
from orchestrator.islands.backend import IslandsBackend
from orchestrator.islands.local.clusters import LocalIslands
from orchestrator.pipeline.graph import build_graph
from orchestrator.run.run_folder import RunFolder

SMALL = (
    "experiment=digits",
    "monolith=false",
    "wandb.mode=disabled",
    "scores.num_samples=64",
    "scores.spaces=[pixels]",
    "ensemble.steps=2",
)


def small_config(folder: Path, islands: LocalIslands, steps: int = 1500) -> RunConfig:
    """Return a run with two experts on the islands and all other stages local."""
    overrides = [*SMALL, f"folder={folder}", f"expert.training.steps={steps}", "expert.training.checkpoint_every=100"]
    config = parse_config(compose(overrides))
    stages = replace(config.compute.stages, router=replace(config.compute.stages.router, islands=("controller",)))
    compute = ComputeConfig(
        backend="islands", islands=islands.configs, stages=stages, cpus=1, backoff_s=0.1, grace_s=20.0, lease_s=60.0
    )
    return replace(config, compute=compute)


def start_controller(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "orchestrator", "resume", str(folder)]
    with (folder / "controller.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def list_trainings(run: RunFolder) -> dict[int, str]:
    """Return the stage of every process on an island that trains for the run, by process id."""
    stages = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "orchestrator.islands.worker" in command and "-m" in command and run.run_id() in str(command):
            stages[int(entry.name)] = command[command.index("--job") + 1].split("/")[1].partition("-")[0]
    return stages


def wait_until(condition, limit_s: float = 400.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def read_progress(run: RunFolder, stage) -> int:
    attempts = run.attempts(stage)
    path = attempts[-1] / "progress.json" if attempts else None
    return read_json(path)["done"] if path and path.is_file() else 0


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_run_with_killed_controller_and_expert_finishes(islands, tmp_path):
    config = small_config(tmp_path, islands, steps=4000)
    run = RunFolder(tmp_path)
    run.save_config(config)
    experts = {stage.name: stage for stage in build_graph(config) if stage.kind == "expert"}
    first = start_controller(tmp_path)
    wait_until(lambda: all(read_progress(run, stage) > 200 for stage in experts.values()))
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = list_trainings(run)
    assert sorted(before.values()) == sorted(experts)
    second = start_controller(tmp_path)
    wait_until(lambda: any(event["event"] == "attached" for event in run.read_events()))
    victim = next(pid for pid, name in list_trainings(run).items() if name == "expert_0")
    os.kill(victim, signal.SIGKILL)
    assert second.wait(timeout=600) == 0, (tmp_path / "controller.log").read_text()
    expert_events = [event for event in run.read_events() if "expert" in event.get("stage", "")]
    events = [(event["event"], event["stage"], event["attempt"]) for event in expert_events]
    submitted = [(stage, attempt) for event, stage, attempt in events if event == "submitted"]
    assert sorted(submitted) == [("expert_0", 1), ("expert_0", 2), ("expert_1", 1)]
    assert ("lost", "expert_0", 1) in events
    log = (run.attempts(experts["expert_0"])[-1] / "log.txt").read_text()
    assert "continuing from step" in log
    assert all(run.is_finished(stage) for stage in build_graph(config))
    attempts = {name: run.attempts(stage) for name, stage in experts.items()}
    placements = {
        name: {read_json(folder / "job.json")["island"] for folder in folders} for name, folders in attempts.items()
    }
    for island, island_config in islands.configs.items():
        storage = Path(island_config.storage) / run.run_id()
        uploaded = {f"expert_{path.parent.name}" for path in storage.glob("artifacts/partition-*/latents/*/.tree.json")}
        assert uploaded == {name for name, names in placements.items() if island in names}


@pytest.mark.integration
def test_backend_with_wrong_token_raises_before_any_job(islands, tmp_path):
    config = small_config(tmp_path, islands)
    token = tmp_path / "token"
    token.write_text("f" * 64)
    token.chmod(0o600)
    wrong = {name: replace(island, token_file=str(token)) for name, island in config.compute.islands.items()}
    with pytest.raises(IslandError, match="refuses the token"):
        IslandsBackend(replace(config.compute, islands=wrong), RunFolder(tmp_path), lambda: None)
    token.chmod(0o644)
    with pytest.raises(IslandError, match="chmod 600"):
        IslandsBackend(replace(config.compute, islands=wrong), RunFolder(tmp_path), lambda: None)


@pytest.mark.integration
def test_manifest_of_expert_has_its_island(islands, tmp_path):
    config = small_config(tmp_path, islands, steps=50)
    run = RunFolder(tmp_path)
    run.save_config(config)
    assert start_controller(tmp_path).wait(timeout=240) == 0
    names = {read_manifest(run.artifact(stage)).island for stage in build_graph(config) if stage.kind == "expert"}
    assert names <= set(config.compute.islands)


@pytest.mark.integration
def test_adapters_train_on_islands_with_their_own_inputs(islands, tmp_path):
    config = small_config(tmp_path / "run", islands, steps=2)
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        Image.new("L", (28, 28), 20 * number).save(images / f"{number}.png")
    training = replace(config.expert.training, steps=2, batch_size=4)
    config = replace(
        config, finetune=FinetuneConfig(images=str(images), content="x", experts=(0, 1), rank=2, training=training)
    )
    run = RunFolder(tmp_path / "run")
    run.save_config(config)
    assert start_controller(tmp_path / "run").wait(timeout=400) == 0
    stages = {stage.name: stage for stage in build_graph(config)}
    assert read_manifest(run.artifact(stages["adapter_images"])).island not in config.compute.islands
    for k in range(2):
        adapter = run.artifact(stages[f"adapter_{k}"])
        assert read_manifest(adapter).island in config.compute.islands
        assert (adapter / "training.json").is_file()
    places = {k: read_manifest(run.artifact(stages[f"adapter_{k}"])).island for k in range(2)}
    for name, island in config.compute.islands.items():
        storage = Path(island.storage) / run.run_id()
        uploaded = {path.parent.name for path in storage.glob("artifacts/adapter_images-*/*/.tree.json")}
        assert uploaded == {str(k) for k, place in places.items() if place == name}
