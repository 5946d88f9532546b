"""Who runs when: the run's own frontier and the run's own placement, walked on a virtual clock.

Nothing waits that fits somewhere, and a stage that ends frees its place for the next: list scheduling (Graham 1969,
doi:10.1137/0117039), so that on equal islands the end is never later than twice the best.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.config.compute import CONTROLLER, ComputeConfig
from orchestrator.errors import ConfigError
from orchestrator.islands.placement import load_of, place
from orchestrator.pipeline.stage import Stage
from orchestrator.run.backend import Job
from orchestrator.run.ready_queue import ReadyQueue


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedExecution:
    """A stage at its place, from when to when, in seconds from now."""

    stage: str
    place: str
    starts_s: float
    ends_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What home may use at once."""

    cpus: float
    gpus: float
    stages: float = math.inf


def home_capacity(compute: ComputeConfig) -> Capacity:
    """What the backend gives the stages at home; a Slurm queue and a Ray cluster elsewhere are taken to be endless."""
    if compute.backend == "inline":
        return Capacity(cpus=math.inf, gpus=math.inf, stages=1)
    if compute.backend == "slurm" or compute.address is not None:
        return Capacity(cpus=math.inf, gpus=math.inf)
    return Capacity(cpus=compute.cpus_here, gpus=compute.gpus)


def simulate_run(
    graph: Sequence[Stage],
    finished: Collection[str],
    compute: ComputeConfig,
    seconds: Callable[[Stage, str], float],
    start_s: Mapping[str, float],
) -> list[PlannedExecution]:
    """The visits of all stages that are not finished, in the order of their starts; raises `ConfigError`.

    `start_s` is the time that a new process needs at each place; home uses its processes again.
    """
    clock, frontier, taken = _Simulator(compute, seconds, start_s), ReadyQueue(graph), set[str]()

    def take(stage: Stage) -> bool:
        if stage.name in finished:
            frontier.finish(stage.name)
        elif not clock.start(stage):
            return False
        taken.add(stage.name)
        return True

    while len(taken) < len(graph) or clock.running:
        before = len(taken)
        frontier.dispatch(take)
        if len(taken) > before:
            continue
        if not clock.running:
            raise ConfigError(
                f"home has {clock.home.cpus:g} CPUs and {clock.home.gpus:g} GPUs, and one of "
                f"{', '.join(stage.name for stage in graph if stage.name not in taken)} asks for more; "
                "change compute.stages, compute.cpus or compute.gpus"
            )
        for name in clock.advance():
            frontier.finish(name)
    return clock.visits


def critical_path(graph: Sequence[Stage], finished: Collection[str], seconds: Mapping[str, float]) -> float:
    """The longest chain of stages that wait for each other: what endless islands could not shorten."""
    ends: dict[str, float] = {}
    for stage in graph:
        before = max((ends[given.stage.name] for given in stage.inputs.values()), default=0.0)
        ends[stage.name] = before + (0.0 if stage.name in finished else seconds[stage.name])
    return max(ends.values(), default=0.0)


class _Simulator:
    """What runs now, and what has run."""

    def __init__(
        self, compute: ComputeConfig, seconds: Callable[[Stage, str], float], start_s: Mapping[str, float]
    ) -> None:
        self.compute, self.seconds, self.start_s = compute, seconds, start_s
        self.home = home_capacity(compute)
        self.now = 0.0
        self.running: list[tuple[float, int, Job]] = []
        self.visits: list[PlannedExecution] = []
        self._numbers = itertools.count()
        self._processes_at_home = 0

    def start(self, stage: Stage) -> bool:
        """Begin a stage where the run would; False if there is no room now."""
        job = _job(stage, "")
        chosen = self._place(job)
        if chosen is None:
            return False
        ends_s = self.now + self._start_s(chosen) + self.seconds(stage, chosen)
        heapq.heappush(self.running, (ends_s, next(self._numbers), _job(stage, chosen)))
        self.visits.append(PlannedExecution(stage=stage.name, place=chosen, starts_s=self.now, ends_s=ends_s))
        return True

    def advance(self) -> list[str]:
        """Go on to the next end; the stages that end then."""
        self.now = self.running[0][0]
        ended = []
        while self.running and self.running[0][0] == self.now:
            ended.append(heapq.heappop(self.running)[2].stage)
        return ended

    def _place(self, job: Job) -> str | None:
        at = {name: [other for _, _, other in self.running if other.island == name] for name in self.compute.islands}
        loads = {name: load_of(jobs) for name, jobs in at.items()}
        chosen = place(job, self.compute, loads) if self.compute.islands else CONTROLLER
        return chosen if chosen != CONTROLLER or self._home_has_room(job) else None

    def _home_has_room(self, job: Job) -> bool:
        here = [other for _, _, other in self.running if other.island == CONTROLLER]
        load = load_of([*here, job])
        return len(here) < self.home.stages and load.cpus <= self.home.cpus and load.gpus <= self.home.gpus + 1e-9

    def _start_s(self, chosen: str) -> float:
        """How long the stage waits for a process; at home the next one finds that of the last."""
        if chosen == CONTROLLER and self.compute.backend != "slurm":
            if sum(job.island == CONTROLLER for _, _, job in self.running) < self._processes_at_home:
                return 0.0
            self._processes_at_home += 1
        return self.start_s.get(chosen, 0.0)


def _job(stage: Stage, island: str) -> Job:
    """As much of a job as its placement depends on."""
    return Job(
        stage=stage.name,
        kind=stage.kind,
        config={},
        inputs={},
        input_fingerprints={},
        artifact="",
        scratch="",
        attempt=0,
        stop_files=(),
        resources=stage.resources,
        island=island,
    )
