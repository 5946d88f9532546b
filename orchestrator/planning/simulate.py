"""Which stage runs when and where: the run's own ready queue and placement on a virtual clock.

No stage waits that fits somewhere, and a stage that ends frees its place for the next one. This is list scheduling
(Graham 1969, doi:10.1137/0117039): on equal islands the run ends at most twice as late as the best schedule.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.config.compute import CONTROLLER, ComputeConfig
from orchestrator.errors import ConfigError
from orchestrator.islands.placement import compute_load, place
from orchestrator.pipeline.stage import Stage
from orchestrator.run.backend import Job
from orchestrator.run.ready_queue import ReadyQueue


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedExecution:
    """A stage, its place, its start and its end, in seconds from now."""

    stage: str
    place: str
    starts_s: float
    ends_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Resources of the controller's machine."""

    cpus: float
    gpus: float
    stages: float = math.inf
    """Stages at once."""


def controller_capacity(compute: ComputeConfig) -> Capacity:
    """Return what the backend may use at the controller; a Slurm queue or a remote Ray cluster counts as unlimited."""
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
    """Return the executions of all unfinished stages, in the order of their starts; raises `ConfigError`.

    `seconds` returns the duration of a stage at a place. `start_s` is the time that a new process takes to start at
    each place; the controller reuses its processes.
    """
    simulator, queue, taken = _Simulator(compute, seconds, start_s), ReadyQueue(graph), set[str]()

    def take(stage: Stage) -> bool:
        if stage.name in finished:
            queue.finish(stage.name)
        elif not simulator.start(stage):
            return False
        taken.add(stage.name)
        return True

    while len(taken) < len(graph) or simulator.running:
        count = len(taken)
        queue.dispatch(take)
        if len(taken) > count:
            continue
        if not simulator.running:
            waiting = [stage.name for stage in graph if stage.name not in taken]
            raise ConfigError(
                f"the controller has {simulator.capacity.cpus:g} CPUs and {simulator.capacity.gpus:g} GPUs, and one of "
                f"{', '.join(waiting)} needs more; change compute.stages, compute.cpus or compute.gpus"
            )
        for name in simulator.advance():
            queue.finish(name)
    return simulator.executions


def critical_path(graph: Sequence[Stage], finished: Collection[str], seconds: Mapping[str, float]) -> float:
    """Return the duration of the longest chain of dependent stages, a lower bound for any number of islands."""
    ends: dict[str, float] = {}
    for stage in graph:
        start = max((ends[artifact.stage.name] for artifact in stage.inputs.values()), default=0.0)
        ends[stage.name] = start + (0.0 if stage.name in finished else seconds[stage.name])
    return max(ends.values(), default=0.0)


class _Simulator:
    """The virtual clock with the stages that run now and all executions so far."""

    def __init__(
        self, compute: ComputeConfig, seconds: Callable[[Stage, str], float], start_s: Mapping[str, float]
    ) -> None:
        self.compute, self.seconds, self.start_s = compute, seconds, start_s
        self.capacity = controller_capacity(compute)
        self.now = 0.0
        self.running: list[tuple[float, int, Job]] = []
        """Heap of end, number and job."""
        self.executions: list[PlannedExecution] = []
        self._numbers = itertools.count()
        self._controller_processes = 0

    def start(self, stage: Stage) -> bool:
        """Start a stage where the run would; False if there is no room now."""
        chosen = self._choose_place(_placement_job(stage, ""))
        if chosen is None:
            return False
        ends_s = self.now + self._process_start_s(chosen) + self.seconds(stage, chosen)
        heapq.heappush(self.running, (ends_s, next(self._numbers), _placement_job(stage, chosen)))
        self.executions.append(PlannedExecution(stage=stage.name, place=chosen, starts_s=self.now, ends_s=ends_s))
        return True

    def advance(self) -> list[str]:
        """Advance the clock to the next end; return the stages that end then."""
        self.now = self.running[0][0]
        ended = []
        while self.running and self.running[0][0] == self.now:
            ended.append(heapq.heappop(self.running)[2].stage)
        return ended

    def _choose_place(self, job: Job) -> str | None:
        if not self.compute.islands:
            chosen: str | None = CONTROLLER
        else:
            loads = {name: compute_load(self._jobs_at(name)) for name in self.compute.islands}
            chosen = place(job, self.compute, loads)
        return chosen if chosen != CONTROLLER or self._controller_has_room(job) else None

    def _jobs_at(self, name: str) -> list[Job]:
        return [job for _, _, job in self.running if job.island == name]

    def _controller_has_room(self, job: Job) -> bool:
        jobs, capacity = self._jobs_at(CONTROLLER), self.capacity
        load = compute_load([*jobs, job])
        return len(jobs) < capacity.stages and load.cpus <= capacity.cpus and load.gpus <= capacity.gpus + 1e-9

    def _process_start_s(self, chosen: str) -> float:
        """Return how long the stage waits for a process; the controller reuses idle ones."""
        if chosen == CONTROLLER and self.compute.backend != "slurm":
            if len(self._jobs_at(CONTROLLER)) < self._controller_processes:
                return 0.0
            self._controller_processes += 1
        return self.start_s.get(chosen, 0.0)


def _placement_job(stage: Stage, island: str) -> Job:
    """Return a job with the fields that placement reads."""
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
