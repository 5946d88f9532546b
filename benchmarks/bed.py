"""The test bed of `benchmarks.reliability`: runs on real Ray clusters on this machine, and what is done to them.

A controller is `ddm resume` in a process of its own; a victim is whatever process on an island trains for the run.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from ddm_core.artifacts import is_finished, read_json, read_manifest
from orchestrator.config.compute import ComputeConfig, IslandConfig
from orchestrator.config.hydra_compose import compose
from orchestrator.config.schema import RunConfig, parse_config
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import Stage
from orchestrator.run.attempts import CONTINUED, resumed_from_step
from orchestrator.run.lease import process_start
from orchestrator.run.run_folder import RunFolder

OVERRIDES = (
    "experiment=digits",
    "monolith=false",
    "wandb.mode=disabled",
    "partition.num_experts=4",
    "scores.num_samples=128",
    "ensemble.steps=4",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How long the experts of a trial train."""

    steps: int
    checkpoint_every: int
    num_experts: int = 4


def run_config(folder: Path, recipe: Recipe, islands: dict[str, IslandConfig], policy: ComputeConfig) -> RunConfig:
    """A small run on digits whose experts train on the islands."""
    training = {
        "expert.training.steps": recipe.steps,
        "expert.training.checkpoint_every": recipe.checkpoint_every,
        "expert.training.log_every": max(1, recipe.checkpoint_every // 10),
        "partition.num_experts": recipe.num_experts,
    }
    composed = compose([*OVERRIDES, *(f"{key}={value}" for key, value in training.items()), f"folder={folder}"])
    stages = replace(policy.stages, router=replace(policy.stages.router, islands=("controller",)))
    compute = replace(policy, backend="islands", islands=islands, stages=stages, cpus=1)
    return replace(parse_config(composed), compute=compute)


@dataclass
class Trial:
    """One run folder and the controllers that walk it, one after the other."""

    config: RunConfig
    seen: dict[int, str] = field(default_factory=dict)
    """Every process that trained for the run: pid and stage."""

    @property
    def run(self) -> RunFolder:
        """The run folder."""
        return RunFolder(Path(self.config.folder))

    @property
    def experts(self) -> list[Stage]:
        """The stages that train on islands."""
        return [stage for stage in build_graph(self.config) if stage.kind == "expert"]

    def prepare(self, template: Path | None = None) -> None:
        """A fresh run folder; from a template it has all that comes before the experts."""
        shutil.rmtree(self.run.root, ignore_errors=True)
        self.run.root.mkdir(parents=True)
        if template is not None:
            for kind in ("artifacts", "work"):
                shutil.copytree(template / kind, self.run.root / kind)
        self.run.save_config(self.config)

    def controller(self) -> subprocess.Popen[bytes]:
        """Start a controller; what it prints goes to `controller.log` in the run folder."""
        with (self.run.root / "controller.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "orchestrator", "resume", str(self.run.root)],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def victims(self) -> dict[int, str]:
        """The processes that train for this run now: pid and stage."""
        found, storage = {}, f"/{self.run.run_id()}"
        for pid, command in processes():
            if "orchestrator.islands.worker" in command and any(part.endswith(storage) for part in command):
                found[pid] = command[command.index("--job") + 1].split("/")[1].partition("-")[0]
        self.seen |= found
        return found

    def models(self) -> dict[str, dict[str, str]]:
        """Checksums of every finished expert's files, the manifest aside."""
        return {
            stage.name: read_manifest(self.run.artifact(stage)).checksums
            for stage in self.experts
            if self.run.finished(stage)
        }

    def is_finished(self) -> bool:
        """Whether every stage has its artifact."""
        return all(is_finished(self.run.artifact(stage)) for stage in build_graph(self.config))

    def events(self, *names: str) -> list[dict[str, object]]:
        """The journal's events of these names."""
        return [event for event in self.run.events() if event["event"] in names]

    def progress(self, stage: str) -> int:
        """The last step that an expert has reported home."""
        found = [one for one in self.experts if one.name == stage]
        attempts = self.run.attempts(found[0]) if found else []
        return last_step(attempts[-1]) if attempts else 0


def processes() -> Iterator[tuple[int, list[str]]]:
    """Every process of this machine with its command line."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        yield int(entry.name), command


def kill(pid: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal; False if the process was gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a controller and everything that it started at home."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass
class Killer:
    """Sends every victim one signal, a random time after it was first seen."""

    trial: Trial
    life_s: Callable[[], float]
    """How long the next victim is left alone."""
    most: float = float("inf")
    signal: int = signal.SIGKILL
    is_ripe: Callable[[str], bool] = lambda stage: True
    """Whether a stage's victim may be taken, once its time has come."""
    killed: int = 0
    due: dict[int, float] = field(default_factory=dict)

    def look(self) -> None:
        """Take those whose time has come."""
        now = time.monotonic()
        for pid, stage in self.trial.victims().items():
            if pid not in self.due:
                self.due[pid] = now + self.life_s()
            has_come = self.killed < self.most and now >= self.due[pid] and self.is_ripe(stage)
            if has_come and process_start(pid) is not None and kill(pid, self.signal):
                self.killed += 1
                self.due[pid] = float("inf")

    def follow(self, controller: subprocess.Popen[bytes]) -> int:
        """Look until the controller has ended; its exit code."""
        while controller.poll() is None:
            self.look()
            time.sleep(0.05)
        return controller.returncode


def restart_seconds(attempts: Sequence[Path]) -> list[float]:
    """From submission until the training goes on from its checkpoint, for every attempt that did."""
    found = []
    for attempt in attempts:
        log = attempt / "log.txt"
        for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else []:
            if CONTINUED.search(line):
                said = datetime.strptime(line.partition(",")[0], "%Y-%m-%d %H:%M:%S").astimezone().timestamp()
                found.append(max(0.0, said - (attempt / "job.json").stat().st_mtime))
    return found


def last_step(attempt: Path) -> int:
    """The last step that an attempt has told of."""
    written = attempt / "progress.json"
    return int(read_json(written)["done"]) if written.is_file() else 0


def lost_steps(attempts: Sequence[Path]) -> list[int]:
    """Steps that were done again, for every pair of attempts that follow each other and both trained."""
    pairs = zip(attempts, attempts[1:], strict=False)
    return [max(0, last_step(before) - resumed_from_step(after)) for before, after in pairs if last_step(after)]
