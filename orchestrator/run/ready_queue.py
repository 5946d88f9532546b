"""Which stages of a graph could start now: their inputs are there, and they wait for nothing but room.

Every question costs as much as its answer is long, so a walk over ten thousand stages takes ten times as long as one
over a thousand.
"""

import heapq
import itertools
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence

from orchestrator.config.compute import ResourcesConfig
from orchestrator.pipeline.stage import Stage

Demand = tuple[str, ResourcesConfig, int]
"""What placing a stage depends on: its kind, its resources, and how often it was lost on preemptible islands."""


class ReadyQueue:
    """The border between what is finished and what is not."""

    def __init__(self, graph: Sequence[Stage], finished: Collection[str] = (), taken: Collection[str] = ()) -> None:
        self._readers: dict[str, list[Stage]] = defaultdict(list)
        self._lacks: dict[str, int] = {}
        self._ready: dict[Demand, deque[Stage]] = {}
        self._delayed: list[tuple[float, int, Stage]] = []
        self._losses: dict[str, int] = {}
        self._numbers = itertools.count()
        self._taken = frozenset(taken)
        for stage in graph:
            needed = {given.stage.name for given in stage.inputs.values()} - set(finished)
            self._lacks[stage.name] = len(needed)
            for name in needed:
                self._readers[name].append(stage)
            if not needed and stage.name not in finished and stage.name not in taken:
                self._queue(stage)

    def finish(self, name: str) -> None:
        """A stage's artifact is there: whoever waited for nothing else is ready."""
        for reader in self._readers.pop(name, []):
            self._lacks[reader.name] -= 1
            if not self._lacks[reader.name] and reader.name not in self._taken:
                self._queue(reader)

    def requeue(self, stage: Stage, not_before: float, losses: int = 0) -> None:
        """A stage is to be started again, but not before a moment (seconds since the epoch)."""
        self._losses[stage.name] = losses
        heapq.heappush(self._delayed, (not_before, next(self._numbers), stage))

    def dispatch(self, start: Callable[[Stage], bool]) -> None:
        """Offer every ready stage to `start`, until it refuses one; others of the same demand are then not offered."""
        while self._delayed and self._delayed[0][0] <= time.time():
            self._queue(heapq.heappop(self._delayed)[2])
        for queue in list(self._ready.values()):
            while queue and start(queue[0]):
                queue.popleft()
        self._ready = {demand: queue for demand, queue in self._ready.items() if queue}

    def preemption_count(self, stage: Stage) -> int:
        """How often the stage was lost on preemptible islands, as far as this walk was told."""
        return self._losses.get(stage.name, 0)

    def is_exhausted(self) -> bool:
        """Whether nothing is ready and nothing will be by waiting."""
        return not self._ready and not self._delayed

    def only_delayed(self) -> bool:
        """Whether there is nothing to do but to wait for a delay to end."""
        return bool(self._delayed) and not self._ready

    def delays(self) -> Mapping[str, float]:
        """When each delayed stage may start again."""
        return {stage.name: moment for moment, _, stage in self._delayed}

    def _queue(self, stage: Stage) -> None:
        demand = (stage.kind, stage.resources, self._losses.get(stage.name, 0))
        self._ready.setdefault(demand, deque()).append(stage)
