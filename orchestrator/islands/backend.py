"""All islands and the controller's machine as one backend: places each stage, and collects outcomes."""

import functools
import queue
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ddm_core.artifacts import write_record
from orchestrator.config.compute import CONTROLLER, ComputeConfig
from orchestrator.islands.connection import IslandConnection
from orchestrator.islands.placement import compute_load, place
from orchestrator.islands.wheel import build_wheel
from orchestrator.run.backend import AttemptOutcome, Backend, Job
from orchestrator.run.run_folder import RunFolder


class IslandsBackend:
    """Runs trainings on islands and all other stages locally; jobs on islands outlive this process.

    Raises `IslandError` at once if an island refuses the controller; an unreachable island is polled until it responds.
    """

    def __init__(self, config: ComputeConfig, run: RunFolder, open_local: Callable[[], Backend]) -> None:
        self.config, self.run = config, run
        self._outcomes: queue.Queue[AttemptOutcome] = queue.Queue()
        self._open_local = functools.cache(open_local)
        self._local_stages: set[str] = set()
        wheel = build_wheel(run.root / "wheels")
        self.connections = {
            name: IslandConnection(
                name=name,
                config=island,
                run_root=run.root.absolute(),
                run_id=run.run_id(),
                wheel=wheel,
                record_event=self._record,
                lease_s=config.lease_s,
                grace_s=config.grace_s,
                outcomes=self._outcomes,
            )
            for name, island in config.islands.items()
        }
        with ThreadPoolExecutor(len(self.connections)) as pool:
            list(pool.map(IslandConnection.connect, self.connections.values()))

    def place(self, job: Job) -> str | None:
        """Return the controller, or the best island with enough free resources; None if there is none now."""
        loads = {
            name: compute_load(
                [attempt.job for attempt in list(connection.attempts.values())],
                is_reachable=connection.unreachable_since is None,
                stored_stages=frozenset(connection.stored_stages),
            )
            for name, connection in self.connections.items()
        }
        island = place(job, self.config, loads)
        return island if island != CONTROLLER or self._open_local().place(job) is not None else None

    def submit(self, job: Job) -> None:
        """Send the job to the island where it was placed."""
        if job.island == CONTROLLER:
            self._local_stages.add(job.stage)
            self._open_local().submit(job)
        else:
            self.connections[job.island].add(job)

    def attach(self, job: Job) -> bool:
        """Reattach to an attempt on an island that is still configured; return False for any other attempt."""
        if job.island not in self.connections:
            return False
        self.connections[job.island].add(job)
        return True

    def poll(self, timeout_s: float) -> list[AttemptOutcome]:
        """Return the outcomes of attempts that have ended, local or remote."""
        for connection in self.connections.values():
            connection.start_polling()
        outcomes = self._open_local().poll(timeout_s / 2) if self._open_local.cache_info().currsize else []
        self._local_stages -= {outcome.stage for outcome in outcomes}
        try:
            outcomes.append(self._outcomes.get(timeout=0.0 if outcomes else timeout_s))
            while True:
                outcomes.append(self._outcomes.get_nowait())
        except queue.Empty:
            return outcomes

    def kill(self, stage: str) -> None:
        """End the attempt; an island applies the grace period of every job."""
        if stage in self._local_stages:
            self._open_local().kill(stage)
        for connection in self.connections.values():
            connection.stop(stage)

    def close(self) -> None:
        """Close the connections, which ends no job on an island, and end all local jobs."""
        for connection in self.connections.values():
            connection.close()
        if self._open_local.cache_info().currsize:
            self._open_local().close()

    def _record(self, event: str, **facts: Any) -> None:
        """Write an event to the journal, and the islands' reachability to a file that `ddm status` reads."""
        self.run.record(event, **facts)
        if event in ("unreachable", "recovered"):
            islands = {name: _describe_reachability(each) for name, each in self.connections.items()}
            write_record(self.run.islands, {"islands": islands})


def _describe_reachability(connection: IslandConnection) -> dict[str, Any]:
    return {
        "unreachable_since": connection.unreachable_since,
        "error": connection.unreachable_reason,
        "written": time.time(),
    }
