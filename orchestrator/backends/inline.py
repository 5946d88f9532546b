"""Stages in this process, one after the other: for tests, small machines and the debugger."""

from collections import deque

from orchestrator.errors import ConfigError
from orchestrator.run.backend import AttemptOutcome, Job


class InlineBackend:
    """Runs the oldest waiting job whenever it is polled."""

    def __init__(self) -> None:
        self._waiting: deque[Job] = deque()
        self._killed: list[AttemptOutcome] = []

    def place(self, job: Job) -> str | None:
        """Here, one at a time."""
        return None if self._waiting else ""

    def attach(self, job: Job) -> bool:
        """What ran in this process has ended with it."""
        return False

    def submit(self, job: Job) -> None:
        """Put the job at the end of the queue; `ConfigError` if it asks for more than this one process."""
        if job.resources.workers > 1:
            raise ConfigError(
                f"stage {job.stage} asks for {job.resources.workers} workers, and compute.backend=inline has one; "
                f"set compute.backend=ray, or compute.stages.{job.kind}.workers=1"
            )
        self._waiting.append(job)

    def poll(self, timeout_s: float) -> list[AttemptOutcome]:
        """Run one job to its end; `timeout_s` does not matter here."""
        if self._killed or not self._waiting:
            killed, self._killed = self._killed, []
            return killed
        from orchestrator.run.worker import execute  # torch is imported only where a stage runs

        return [execute(self._waiting.popleft())]

    def kill(self, stage: str) -> None:
        """Take a waiting job out; a running one can only be asked to stop, as it runs in this very process."""
        for job in [job for job in self._waiting if job.stage == stage]:
            self._waiting.remove(job)
            self._killed.append(AttemptOutcome(stage=stage, attempt=job.attempt, state="lost", transient=True))

    def close(self) -> None:
        """Nothing was started."""
