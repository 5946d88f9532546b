"""All islands and the home of the controller as one backend: places each stage, and collects how attempts end."""

import functools
import queue
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ddm_core.artifacts import write_json
from orchestrator.config.compute import CONTROLLER, ComputeConfig
from orchestrator.islands.connection import IslandConnection
from orchestrator.islands.placement import load_of, place
from orchestrator.islands.wheel import build_wheel
from orchestrator.run.backend import AttemptOutcome, Backend, Job
from orchestrator.run.run_folder import RunFolder


class IslandsBackend:
    """Trainings on islands, everything else at home; what runs on islands outlives this process.

    Raises `IslandError` at once if an island refuses us; one that only does not answer is waited for.
    """

    def __init__(self, config: ComputeConfig, run: RunFolder, home: Callable[[], Backend]) -> None:
        self.config, self.run = config, run
        self._outcomes: queue.Queue[AttemptOutcome] = queue.Queue()
        self._open_home = functools.cache(home)
        self._at_home: set[str] = set()
        wheel = build_wheel(run.root / "wheels")
        self.lines = {
            name: IslandConnection(
                name=name,
                config=island,
                run_root=run.root.absolute(),
                run_id=run.run_id(),
                wheel=wheel,
                event=self._record,
                lease_s=config.lease_s,
                grace_s=config.grace_s,
                outcomes=self._outcomes,
            )
            for name, island in config.islands.items()
        }
        with ThreadPoolExecutor(len(self.lines)) as pool:
            list(pool.map(IslandConnection.connect, self.lines.values()))

    def place(self, job: Job) -> str | None:
        """Home, or the island that suits the job best among those that have room."""
        loads = {
            name: load_of(
                [track.job for track in list(line.tracks.values())],
                is_reachable=line.unreachable_since is None,
                held=frozenset(line.held),
            )
            for name, line in self.lines.items()
        }
        chosen = place(job, self.config, loads)
        return chosen if chosen != CONTROLLER or self._open_home().place(job) is not None else None

    def submit(self, job: Job) -> None:
        """Send the job where it was placed."""
        if job.island == CONTROLLER:
            self._at_home.add(job.stage)
            self._open_home().submit(job)
        else:
            self.lines[job.island].add(job)

    def attach(self, job: Job) -> bool:
        """Whether the attempt may have outlived its controller: whatever went to an island that still is configured."""
        if job.island not in self.lines:
            return False
        self.lines[job.island].add(job)
        return True

    def poll(self, timeout_s: float) -> list[AttemptOutcome]:
        """The attempts that have ended, at home or anywhere."""
        for line in self.lines.values():
            line.start_polling()
        found = self._open_home().poll(timeout_s / 2) if self._at_home else []
        self._at_home -= {outcome.stage for outcome in found}
        try:
            found.append(self._outcomes.get(timeout=0.0 if found else timeout_s))
            while True:
                found.append(self._outcomes.get_nowait())
        except queue.Empty:
            return found

    def kill(self, stage: str) -> None:
        """End the attempt; an island gives it the grace that every job has."""
        if stage in self._at_home:
            self._open_home().kill(stage)
        for line in self.lines.values():
            line.stop(stage)

    def close(self) -> None:
        """Leave the islands alone; end what was started at home."""
        for line in self.lines.values():
            line.close()
        if self._open_home.cache_info().currsize:
            self._open_home().close()

    def _record(self, event: str, **facts: Any) -> None:
        """Write an event into the journal, and who answers into a file that `ddm status` reads."""
        self.run.record(event, **facts)
        if event in ("unreachable", "recovered"):
            write_json(self.run.islands, {name: _standing(line) for name, line in self.lines.items()})


def _standing(line: IslandConnection) -> dict[str, Any]:
    return {"unreachable_since": line.unreachable_since, "error": line.reason, "written": time.time()}
