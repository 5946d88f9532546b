"""The experts on their islands against one monolith on the same machines, joined into one Ray cluster."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.config.compute import CONTROLLER, ComputeConfig, IslandConfig, ResourcesConfig
from orchestrator.config.schema import RunConfig
from orchestrator.config.stage_kinds import OUR_KINDS, TRAINING_KINDS
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import Stage
from orchestrator.planning.calibration import Calibration
from orchestrator.planning.estimate import estimate_stage, expected_seconds
from orchestrator.planning.simulate import PlannedExecution, controller_capacity, simulate_run
from orchestrator.reporting.costs import island_share

COMMUNICATION_SHARE = 0.1
"""Largest share of a step for all-reduce."""

BYTES_PER_PARAMETER = 4

FORMULA = "2 × parameters × 4 bytes × (n - 1)/n sent by each of n workers every step, in 10 % of a step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A machine, or the part of one, that could train one expert."""

    images_per_s: float
    price_per_hour: float = 0.0
    preemptions_per_hour: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SynchronousRun:
    """The monolith's training on synchronous workers."""

    workers: int
    step_s: float
    """Without communication; the slowest worker determines it."""
    seconds: float
    """All steps, with the bandwidth below."""
    expected_s: float
    """With losses: the loss of one worker returns all workers to the last checkpoint."""
    price: float
    """All workers for the expected time."""
    bytes_per_step: float
    """Sent and received by each worker in every step."""
    bits_per_s: float
    """Bandwidth that each worker needs to every other site."""
    total_bytes: float
    """Sent by all workers in the complete training."""


def all_reduce_bytes(parameters: int, workers: int) -> float:
    """Return the bytes that one worker of a ring sends per step: 2 * parameters * 4 bytes * (n - 1) / n.

    Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002: no all-reduce sends less.
    """
    return 2 * parameters * BYTES_PER_PARAMETER * (workers - 1) / workers


def estimate_synchronous(
    workers: Sequence[Worker],
    *,
    parameters: int,
    batch_size: int,
    steps: int,
    checkpoint_every: int,
    restart_s: float,
) -> SynchronousRun:
    """Estimate one training that divides the global batch equally among the workers."""
    count = len(workers)
    step_s = batch_size / count / min(worker.images_per_s for worker in workers)
    bytes_per_step = all_reduce_bytes(parameters, count)
    losses_per_hour = sum(worker.preemptions_per_hour for worker in workers)
    expected_s = expected_seconds(steps * step_s, checkpoint_every * step_s, losses_per_hour, restart_s)
    return SynchronousRun(
        workers=count,
        step_s=step_s,
        seconds=steps * step_s,
        expected_s=expected_s,
        price=sum(worker.price_per_hour for worker in workers) * expected_s / 3600,
        bytes_per_step=bytes_per_step,
        bits_per_s=8 * bytes_per_step / (COMMUNICATION_SHARE * step_s),
        total_bytes=bytes_per_step * count * steps,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineComparison:
    """Experts and router against the monolith: training alone, without other stages."""

    experts_s: float
    """From the first step of any expert or the router to the last one; process starts excluded."""
    experts_price: float
    monolith: SynchronousRun
    """On as many workers as experts can train at once, each as fast as for an expert."""


def compare_with_synchronous(
    config: RunConfig,
    calibration: Calibration,
    seconds: Callable[[Stage, str], float],
    start_s: Mapping[str, float],
) -> BaselineComparison | None:
    """Compare both trainings; None if the speed of a machine is unknown."""
    workers = available_workers(config, calibration)
    if not workers:
        return None
    trainings = [
        replace(stage, inputs={})
        for stage in build_graph(config)
        if stage.kind in OUR_KINDS and stage.kind in TRAINING_KINDS
    ]
    executions = simulate_run(trainings, (), config.compute, seconds, {})
    training = config.expert.training
    return BaselineComparison(
        experts_s=max(execution.ends_s for execution in executions),
        experts_price=_total_price(trainings, executions, config.compute, calibration),
        monolith=estimate_synchronous(
            workers,
            parameters=calibration.parameters,
            batch_size=training.batch_size,
            steps=training.steps,
            checkpoint_every=training.checkpoint_every,
            restart_s=max(start_s.values(), default=0.0) + config.compute.backoff_s,
        ),
    )


def available_workers(config: RunConfig, calibration: Calibration) -> list[Worker]:
    """Return as many workers of an expert's size as fit, at most one per expert; empty if a speed is unknown."""
    compute, resources = config.compute, config.compute.stages.expert
    slots = _island_slots(compute, resources) if compute.islands else [(CONTROLLER, None)] * _controller_slots(config)
    speeds = {name: place.speeds["expert"] for name, place in calibration.places.items() if "expert" in place.speeds}
    if any(name not in speeds for name, _ in slots):
        return []
    return [
        Worker(
            images_per_s=resources.workers / speeds[name].unit_s,
            price_per_hour=island.price_per_hour * island_share(island, resources) if island else 0.0,
            preemptions_per_hour=island.preemptions_per_hour * resources.workers if island else 0.0,
        )
        for name, island in slots[: config.partition.num_experts]
    ]


def _island_slots(compute: ComputeConfig, resources: ResourcesConfig) -> list[tuple[str, IslandConfig | None]]:
    """Return one slot for each expert that fits on an island, round-robin over the islands."""
    names = [name for name in resources.islands or compute.islands if name in compute.islands]
    capacity = {name: int(1 / island_share(compute.islands[name], resources) + 1e-9) for name in names}
    rounds = range(max(capacity.values(), default=0))
    return [(name, compute.islands[name]) for number in rounds for name in names if number < capacity[name]]


def _controller_slots(config: RunConfig) -> int:
    capacity, resources = controller_capacity(config.compute), config.compute.stages.expert
    by_gpu = capacity.gpus / (resources.gpus * resources.workers) if resources.gpus else float("inf")
    slots = min(capacity.stages, capacity.cpus / (resources.cpus * resources.workers), by_gpu)
    return int(min(slots, config.partition.num_experts))


def _total_price(
    graph: list[Stage], executions: list[PlannedExecution], compute: ComputeConfig, calibration: Calibration
) -> float:
    places = {execution.stage: execution.place for execution in executions}
    estimates = [estimate_stage(stage, places[stage.name], compute, calibration) for stage in graph]
    return sum(estimate.price for estimate in estimates if estimate is not None)
