"""All islands as one backend: real Ray clusters, real kills."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ddm_core.artifacts import read_json, read_manifest
from orchestrator.config.compute import ComputeConfig
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.errors import IslandError
from orchestrator.islands.backend import IslandsBackend
from orchestrator.islands.local.clusters import LocalIslands
from orchestrator.pipeline.graph import build_graph
from orchestrator.run.run_folder import RunFolder

pytestmark = pytest.mark.slow

SMALL = ("experiment=digits", "monolith=false", "wandb.mode=disabled", "scores.num_samples=64", "ensemble.steps=2")


def small_run(folder: Path, islands: LocalIslands, steps: int = 1500) -> RunConfig:
    """Two experts on the islands, everything else at home."""
    overrides = [*SMALL, f"folder={folder}", f"expert.training.steps={steps}", "expert.training.checkpoint_every=100"]
    config = parse_config(compose(overrides))
    stages = replace(config.compute.stages, router=replace(config.compute.stages.router, islands=("controller",)))
    compute = ComputeConfig(
        backend="islands", islands=islands.configs, stages=stages, cpus=1, backoff_s=0.1, grace_s=20.0, lease_s=60.0
    )
    return replace(config, compute=compute)


def controller(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "orchestrator", "resume", str(folder)]
    with (folder / "controller.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def trainings(run: RunFolder) -> dict[int, str]:
    """Every process on an island that trains for the run, with its stage."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if "orchestrator.islands.worker" in command and "-m" in command and run.run_id() in str(command):
            found[int(entry.name)] = command[command.index("--job") + 1].split("/")[1].partition("-")[0]
    return found


def until(question, limit_s: float = 120.0) -> None:
    give_up = time.monotonic() + limit_s
    while not question():
        assert time.monotonic() < give_up
        time.sleep(0.1)


def progress(run: RunFolder, stage) -> int:
    attempts = run.attempts(stage)
    written = attempts[-1] / "progress.json" if attempts else None
    return read_json(written)["done"] if written and written.is_file() else 0


def test_controllers_and_experts_are_killed_and_the_run_comes_to_its_end(islands, tmp_path):
    config = small_run(tmp_path, islands, steps=4000)
    run = RunFolder(tmp_path)
    run.save_config(config)
    experts = {stage.name: stage for stage in build_graph(config) if stage.kind == "expert"}
    first = controller(tmp_path)
    until(lambda: all(progress(run, stage) > 200 for stage in experts.values()))
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = trainings(run)
    assert sorted(before.values()) == sorted(experts)
    second = controller(tmp_path)
    until(lambda: any(event["event"] == "attached" for event in run.events()))
    victim = next(pid for pid, name in trainings(run).items() if name == "expert_0")
    os.kill(victim, signal.SIGKILL)
    assert second.wait(timeout=240) == 0, (tmp_path / "controller.log").read_text()
    told = [event for event in run.events() if "expert" in event.get("stage", "")]
    events = [(event["event"], event["stage"], event["attempt"]) for event in told]
    submitted = [(stage, attempt) for event, stage, attempt in events if event == "submitted"]
    assert sorted(submitted) == [("expert_0", 1), ("expert_0", 2), ("expert_1", 1)]
    assert ("lost", "expert_0", 1) in events
    log = (run.attempts(experts["expert_0"])[-1] / "log.txt").read_text()
    assert "continuing from step" in log
    assert all(run.finished(stage) for stage in build_graph(config))
    attempts = {name: run.attempts(stage) for name, stage in experts.items()}
    where = {name: {read_json(one / "job.json")["island"] for one in tried} for name, tried in attempts.items()}
    for island, facts in islands.configs.items():
        here = Path(facts.storage) / run.run_id()
        sent = {f"expert_{path.parent.name}" for path in here.glob("artifacts/partition-*/clusters/*/.tree.json")}
        assert sent == {name for name, islands_of_it in where.items() if island in islands_of_it}


def test_a_wrong_token_is_said_before_anything_runs(islands, tmp_path):
    config = small_run(tmp_path, islands)
    token = tmp_path / "token"
    token.write_text("f" * 64)
    token.chmod(0o600)
    wrong = {name: replace(one, token_file=str(token)) for name, one in config.compute.islands.items()}
    with pytest.raises(IslandError, match="refuses the token"):
        IslandsBackend(replace(config.compute, islands=wrong), RunFolder(tmp_path), lambda: None)
    token.chmod(0o644)
    with pytest.raises(IslandError, match="chmod 600"):
        IslandsBackend(replace(config.compute, islands=wrong), RunFolder(tmp_path), lambda: None)


def test_manifests_name_their_island(islands, tmp_path):
    config = small_run(tmp_path, islands, steps=50)
    run = RunFolder(tmp_path)
    run.save_config(config)
    assert controller(tmp_path).wait(timeout=240) == 0
    names = {read_manifest(run.artifact(stage)).island for stage in build_graph(config) if stage.kind == "expert"}
    assert names <= set(config.compute.islands)
