"""Stages in this process, one after the other: for tests, small machines and the debugger."""

from collections import deque

from orchestrator.backend import Job, Outcome


class InlineBackend:
    """Runs the oldest waiting job whenever it is polled."""

    def __init__(self) -> None:
        self._waiting: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        """Put the job at the end of the queue."""
        self._waiting.append(job)

    def poll(self, timeout_s: float) -> list[Outcome]:
        """Run one job to its end; `timeout_s` does not matter here."""
        if not self._waiting:
            return []
        from orchestrator.worker import execute  # torch is imported only where a stage runs

        return [execute(self._waiting.popleft())]

    def kill(self, stage: str) -> None:
        """Forget a waiting job; a running one can only be asked to stop, as it runs in this very process."""
        self._waiting = deque(job for job in self._waiting if job.stage != stage)

    def close(self) -> None:
        """Nothing was started."""
