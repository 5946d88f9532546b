"""Run stages in this process, one after the other: for tests, small machines and the debugger."""

from collections import deque

from orchestrator.errors import ConfigError
from orchestrator.run.backend import AttemptOutcome, Job


class InlineBackend:
    """Runs the oldest waiting job whenever it is polled."""

    def __init__(self) -> None:
        self._waiting: deque[Job] = deque()
        self._killed: list[AttemptOutcome] = []

    def place(self, job: Job) -> str | None:
        """Return the one place, unless a job waits already."""
        return None if self._waiting else ""

    def attach(self, job: Job) -> bool:
        """Return False: jobs of this backend end with their controller."""
        return False

    def submit(self, job: Job) -> None:
        """Queue the job; raises `ConfigError` if it needs more than one process."""
        if job.resources.workers > 1:
            raise ConfigError(
                f"compute.backend=inline has one worker, and stage {job.stage} needs {job.resources.workers}; "
                f"set compute.backend=ray, or compute.stages.{job.kind}.workers=1"
            )
        self._waiting.append(job)

    def poll(self, timeout_s: float) -> list[AttemptOutcome]:
        """Run one job to its end and return its outcome; `timeout_s` is ignored."""
        if self._killed or not self._waiting:
            killed, self._killed = self._killed, []
            return killed
        from orchestrator.run.worker import execute  # torch is imported only where a stage runs

        return [execute(self._waiting.popleft())]

    def kill(self, stage: str) -> None:
        """Remove a waiting job. A running one blocks this process, so only its stop file can end it."""
        for job in [job for job in self._waiting if job.stage == stage]:
            self._waiting.remove(job)
            self._killed.append(AttemptOutcome(stage=stage, attempt=job.attempt, state="lost", transient=True))

    def close(self) -> None:
        """Do nothing: no resources are held."""
