"""A queue of the stages that can start now: all their inputs are finished, and they wait only for room.

Every query takes time proportional to its result, so a graph of ten thousand stages takes ten times as long as one of
a thousand.
"""

import heapq
import itertools
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from operator import itemgetter

from orchestrator.config.compute import ResourcesConfig
from orchestrator.pipeline.stage import Stage

Demand = tuple[int, str, ResourcesConfig, int]
"""The properties that decide a stage's turn and placement: rank, kind, resources, losses on preemptible islands."""


class ReadyQueue:
    """The stages of a graph whose inputs are finished, in queues by demand."""

    def __init__(self, graph: Sequence[Stage], finished: Collection[str] = (), taken: Collection[str] = ()) -> None:
        self._dependents: dict[str, list[Stage]] = defaultdict(list)
        self._unmet_inputs: dict[str, int] = {}
        self._ready: dict[Demand, deque[Stage]] = {}
        self._delayed: list[tuple[float, int, Stage]] = []
        self._losses: dict[str, int] = {}
        self._numbers = itertools.count()
        self._taken = frozenset(taken)
        for stage in graph:
            needed = {source.stage.name for source in stage.inputs.values()} - set(finished)
            self._unmet_inputs[stage.name] = len(needed)
            for name in needed:
                self._dependents[name].append(stage)
            if not needed and stage.name not in finished and stage.name not in taken:
                self._queue(stage)

    def finish(self, name: str) -> None:
        """Mark a stage as finished, and queue the stages that waited only for it."""
        for dependent in self._dependents.pop(name, []):
            self._unmet_inputs[dependent.name] -= 1
            if not self._unmet_inputs[dependent.name] and dependent.name not in self._taken:
                self._queue(dependent)

    def requeue(self, stage: Stage, not_before: float, losses: int = 0) -> None:
        """Queue a stage again, not before a time in seconds since the epoch."""
        self._losses[stage.name] = losses
        heapq.heappush(self._delayed, (not_before, next(self._numbers), stage))

    def dispatch(self, start: Callable[[Stage], bool]) -> None:
        """Call `start` on every ready stage, the lowest rank first; after False, skip those with the same demand."""
        while self._delayed and self._delayed[0][0] <= time.time():
            self._queue(heapq.heappop(self._delayed)[2])
        for demand in sorted(self._ready, key=itemgetter(0)):
            queue = self._ready[demand]
            while queue and start(queue[0]):
                queue.popleft()
        self._ready = {demand: queue for demand, queue in self._ready.items() if queue}

    def preemption_count(self, stage: Stage) -> int:
        """Return how often the stage was lost on preemptible islands, as passed to `requeue`."""
        return self._losses.get(stage.name, 0)

    def is_exhausted(self) -> bool:
        """Return whether no stage is ready or delayed."""
        return not self._ready and not self._delayed

    def has_only_delayed(self) -> bool:
        """Return whether all remaining stages wait for a delay to end."""
        return bool(self._delayed) and not self._ready

    def delays(self) -> Mapping[str, float]:
        """Return the start time of each delayed stage, in seconds since the epoch."""
        return {stage.name: moment for moment, _, stage in self._delayed}

    def _queue(self, stage: Stage) -> None:
        demand = (stage.rank, stage.kind, stage.resources, self._losses.get(stage.name, 0))
        self._ready.setdefault(demand, deque()).append(stage)
