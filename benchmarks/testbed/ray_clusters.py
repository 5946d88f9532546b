"""Test bed of `benchmarks.reliability`: runs on real Ray clusters on this machine, and signals that kill their parts.

A controller is `ddm resume` in a separate process. A victim is a process on an island that trains for the run.
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
from orchestrator.run.attempts import CONTINUED, read_resume_step
from orchestrator.run.lease import process_start_time
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
class TrialConfig:
    """Training length of the experts of a trial."""

    steps: int
    checkpoint_every: int
    num_experts: int = 4


def make_run_config(
    folder: Path, config: TrialConfig, islands: dict[str, IslandConfig], policy: ComputeConfig
) -> RunConfig:
    """Return the configuration of a small run on digits whose experts train on the islands."""
    training = {
        "expert.training.steps": config.steps,
        "expert.training.checkpoint_every": config.checkpoint_every,
        "expert.training.log_every": max(1, config.checkpoint_every // 10),
        "partition.num_experts": config.num_experts,
    }
    composed = compose([*OVERRIDES, *(f"{key}={value}" for key, value in training.items()), f"folder={folder}"])
    stages = replace(policy.stages, router=replace(policy.stages.router, islands=("controller",)))
    compute = replace(policy, backend="islands", islands=islands, stages=stages, cpus=1)
    return replace(parse_config(composed), compute=compute)


@dataclass
class Trial:
    """One run folder and its successive controllers."""

    config: RunConfig
    stages_by_pid: dict[int, str] = field(default_factory=dict)
    """Every process that trained for the run so far, and its stage."""

    @property
    def run(self) -> RunFolder:
        """Return the run folder."""
        return RunFolder(Path(self.config.folder))

    @property
    def experts(self) -> list[Stage]:
        """Return the stages that train on islands."""
        return [stage for stage in build_graph(self.config) if stage.kind == "expert"]

    def prepare(self, template: Path | None = None) -> None:
        """Create an empty run folder, or one with the artifacts of a template."""
        shutil.rmtree(self.run.root, ignore_errors=True)
        self.run.root.mkdir(parents=True)
        if template is not None:
            for kind in ("artifacts", "work"):
                shutil.copytree(template / kind, self.run.root / kind)
        self.run.save_config(self.config)

    def start_controller(self) -> subprocess.Popen[bytes]:
        """Start a controller; its output goes to `controller.log` in the run folder."""
        with (self.run.root / "controller.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "orchestrator", "resume", str(self.run.root)],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def find_victims(self) -> dict[int, str]:
        """Return the stages of the processes that train for this run now, by pid."""
        victims, storage = {}, f"/{self.run.run_id()}"
        for pid, command in list_processes():
            if "orchestrator.islands.worker" in command and any(part.endswith(storage) for part in command):
                victims[pid] = command[command.index("--job") + 1].split("/")[1].partition("-")[0]
        self.stages_by_pid |= victims
        return victims

    def model_checksums(self) -> dict[str, dict[str, str]]:
        """Return the checksums of every finished expert's files, without the manifest."""
        return {
            stage.name: read_manifest(self.run.artifact(stage)).checksums
            for stage in self.experts
            if self.run.is_finished(stage)
        }

    def is_finished(self) -> bool:
        """Return whether every stage has its artifact."""
        return all(is_finished(self.run.artifact(stage)) for stage in build_graph(self.config))

    def events(self, *names: str) -> list[dict[str, object]]:
        """Return the journal's events of these names."""
        return [event for event in self.run.read_events() if event["event"] in names]

    def progress(self, stage: str) -> int:
        """Return the last step that an expert has reported to the controller."""
        matching = [expert for expert in self.experts if expert.name == stage]
        attempts = self.run.attempts(matching[0]) if matching else []
        return last_step(attempts[-1]) if attempts else 0


def list_processes() -> Iterator[tuple[int, list[str]]]:
    """Yield the pid and command line of every process of this machine."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        yield int(entry.name), command


def send_signal(pid: int, number: int = signal.SIGKILL) -> bool:
    """Send a signal; return False if the process no longer exists."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def kill_controller(process: subprocess.Popen[bytes]) -> None:
    """Kill a controller and all processes that it started on this machine."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass
class Killer:
    """Sends every victim one signal, at a random time after its first observation."""

    trial: Trial
    draw_delay_s: Callable[[], float]
    """Draws the delay between the first observation of a victim and its signal."""
    max_kills: float = float("inf")
    signal: int = signal.SIGKILL
    may_kill: Callable[[str], bool] = lambda stage: True
    """Returns whether a stage's victim may be killed after its delay."""
    num_killed: int = 0
    kill_times: dict[int, float] = field(default_factory=dict)
    """Monotonic time of the signal, by pid; infinite after the signal."""

    def kill_due_victims(self) -> None:
        """Send the signal to all victims whose delay has passed."""
        now = time.monotonic()
        for pid, stage in self.trial.find_victims().items():
            if pid not in self.kill_times:
                self.kill_times[pid] = now + self.draw_delay_s()
            is_due = self.num_killed < self.max_kills and now >= self.kill_times[pid] and self.may_kill(stage)
            if is_due and process_start_time(pid) is not None and send_signal(pid, self.signal):
                self.num_killed += 1
                self.kill_times[pid] = float("inf")

    def follow(self, controller: subprocess.Popen[bytes]) -> int:
        """Kill victims until the controller exits; return its exit code."""
        while controller.poll() is None:
            self.kill_due_victims()
            time.sleep(0.05)
        return controller.returncode


def restart_seconds(attempts: Sequence[Path]) -> list[float]:
    """Return the time from submission to resumption from a checkpoint, for every attempt that resumed."""
    durations_s = []
    for attempt in attempts:
        log = attempt / "log.txt"
        for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else []:
            if CONTINUED.search(line):
                resumed = datetime.strptime(line.partition(",")[0], "%Y-%m-%d %H:%M:%S").astimezone().timestamp()
                durations_s.append(max(0.0, resumed - (attempt / "job.json").stat().st_mtime))
    return durations_s


def last_step(attempt: Path) -> int:
    """Return the last step that an attempt has reported."""
    progress_file = attempt / "progress.json"
    return int(read_json(progress_file)["done"]) if progress_file.is_file() else 0


def repeated_steps(attempts: Sequence[Path]) -> list[int]:
    """Return the number of repeated steps, for every pair of consecutive attempts that both trained."""
    pairs = zip(attempts, attempts[1:], strict=False)
    return [max(0, last_step(before) - read_resume_step(after)) for before, after in pairs if last_step(after)]
