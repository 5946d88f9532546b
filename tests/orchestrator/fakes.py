"""A backend with a script, and a small graph."""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from data_partition.config import DataConfig
from ddm_core.artifacts import publish, write_json
from orchestrator.pipeline.stage import Input, Stage
from orchestrator.run.backend import AttemptOutcome, Job, attempt_folder
from orchestrator.run.lease import this_process
from orchestrator.run.run_folder import RunFolder


@dataclass
class ScriptedBackend:
    """Ends every attempt with the next outcome of its stage's script; without a script every attempt finishes."""

    script: dict[str, list[str]] = field(default_factory=dict)
    waiting: list[Job] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    attempts: defaultdict = field(default_factory=lambda: defaultdict(int))

    def place(self, job: Job) -> str | None:
        return ""

    def attach(self, job: Job) -> bool:
        return False

    def submit(self, job: Job) -> None:
        write_json(attempt_folder(job) / "worker.json", this_process())
        self.waiting.append(job)
        self.jobs.append(job)

    def poll(self, timeout_s: float) -> list[AttemptOutcome]:
        hanging = [
            job for job in self.waiting if self._scripted_outcome(job) == "hang" and job.stage not in self.killed
        ]
        ended = [job for job in self.waiting if job not in hanging]
        self.waiting = hanging
        return [self._end(job) for job in ended]

    def kill(self, stage: str) -> None:
        self.killed.append(stage)

    def close(self) -> None:
        self.waiting.clear()

    def _scripted_outcome(self, job: Job) -> str:
        outcomes = self.script.get(job.stage, [])
        return outcomes[self.attempts[job.stage]] if self.attempts[job.stage] < len(outcomes) else "finished"

    def _end(self, job: Job) -> AttemptOutcome:
        outcome = self._scripted_outcome(job)
        self.attempts[job.stage] += 1
        if outcome == "finished":
            publish(Path(job.artifact), _write, stage=job.stage, config=job.config, inputs=job.input_fingerprints)
        state = {"error": "failed", "hang": "lost", "restart": "lost"}.get(outcome, outcome)
        return AttemptOutcome(
            stage=job.stage,
            attempt=job.attempt,
            state=state,
            error=outcome,
            transient=outcome != "error",
            uses_retry=outcome != "restart",
        )


def _write(folder: Path) -> float:
    (folder / "content").write_text("done")
    return 1.0


def diamond(seed: int = 0) -> list[Stage]:
    """Return the graph data -> two optional experts -> ensemble -> score."""
    data = Stage(name="data", kind="dataset", config=DataConfig(version=str(seed)))
    experts = [
        Stage(name=f"expert_{k}", kind="expert", config=k, inputs={"data": Input(stage=data)}, optional=True)
        for k in range(2)
    ]
    ensemble = Stage(
        name="ensemble", kind="ensemble", config="all", inputs={stage.name: Input(stage=stage) for stage in experts}
    )
    score = Stage(name="score", kind="score", config="all", inputs={"ensemble": Input(stage=ensemble)})
    return [data, *experts, ensemble, score]


def run_folder(folder: Path) -> RunFolder:
    """Create an empty run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return RunFolder(folder)
