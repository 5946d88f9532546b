"""The experts on their islands against one monolith on the same machines, joined into one Ray cluster."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.config.compute import CONTROLLER, ComputeConfig, IslandConfig, ResourcesConfig
from orchestrator.config.schema import RunConfig
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import Stage
from orchestrator.planning.calibration import Calibration
from orchestrator.planning.estimate import estimate, expected_seconds
from orchestrator.planning.simulate import PlannedExecution, home_capacity, simulate_run
from orchestrator.reporting.costs import share_of

COMMUNICATION_SHARE = 0.1
"""The part of a step that all-reduce may take."""

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
    """What the monolith would take there."""

    workers: int
    step_s: float
    """Without communication; the slowest worker decides."""
    seconds: float
    """All steps, if the network is as quick as it must be."""
    expected_s: float
    """With losses: one worker's loss sends all of them back to the last checkpoint."""
    price: float
    """All workers, held for the expected time."""
    bytes_per_step: float
    """That each worker sends, and receives, every step."""
    bits_per_s: float
    """The bandwidth that each worker needs for it, to every other site."""
    total_bytes: float
    """That all workers send in the whole training."""


def all_reduce_bytes(parameters: int, workers: int) -> float:
    """What one worker sends a step: 2 * parameters * 4 bytes * (n - 1) / n, of a ring.

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
    """One training of so many steps with the global batch divided equally among the workers."""
    count = len(workers)
    step_s = batch_size / count / min(worker.images_per_s for worker in workers)
    sent = all_reduce_bytes(parameters, count)
    losses = sum(worker.preemptions_per_hour for worker in workers)
    expected_s = expected_seconds(steps * step_s, checkpoint_every * step_s, losses, restart_s)
    return SynchronousRun(
        workers=count,
        step_s=step_s,
        seconds=steps * step_s,
        expected_s=expected_s,
        price=sum(worker.price_per_hour for worker in workers) * expected_s / 3600,
        bytes_per_step=sent,
        bits_per_s=8 * sent / (COMMUNICATION_SHARE * step_s),
        total_bytes=sent * count * steps,
    )


OURS = ("expert", "router")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineComparison:
    """Training alone, baseline and scores left out."""

    experts_s: float
    """From the first expert's or the router's first step to the last one's end; starts of processes left out."""
    experts_price: float
    monolith: SynchronousRun
    """On as many workers as experts can train at once, every one as quick as it is for an expert."""


def compare(
    config: RunConfig,
    calibration: Calibration,
    seconds: Callable[[Stage, str], float],
    start_s: Mapping[str, float],
) -> BaselineComparison | None:
    """None where the speed of a machine is not known."""
    workers = available_workers(config, calibration)
    if not workers:
        return None
    graph = [stage for stage in build_graph(replace(config, monolith=False)) if stage.kind in OURS]
    alone = [replace(stage, inputs={}) for stage in graph]
    visits = simulate_run(alone, (), config.compute, seconds, {})
    training = config.expert.training
    return BaselineComparison(
        experts_s=max(visit.ends_s for visit in visits),
        experts_price=_price(alone, visits, config.compute, calibration),
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
    """As many workers of an expert's size as there is room for, at most one for each expert."""
    compute, asked = config.compute, config.compute.stages.expert
    slots = _island_slots(compute, asked) if compute.islands else [(CONTROLLER, None)] * _home_slots(config)
    measured = {name: place.speeds["expert"] for name, place in calibration.places.items() if "expert" in place.speeds}
    if any(name not in measured for name, _ in slots):
        return []
    return [
        Worker(
            images_per_s=asked.workers / measured[name].unit_s,
            price_per_hour=island.price_per_hour * share_of(island, asked) if island else 0.0,
            preemptions_per_hour=island.preemptions_per_hour * asked.workers if island else 0.0,
        )
        for name, island in slots[: config.partition.num_experts]
    ]


def _island_slots(compute: ComputeConfig, asked: ResourcesConfig) -> list[tuple[str, IslandConfig | None]]:
    """One for each expert that an island could hold, the islands taking turns."""
    names = [name for name in asked.islands or compute.islands if name in compute.islands]
    room = {name: int(1 / share_of(compute.islands[name], asked) + 1e-9) for name in names}
    turns = range(max(room.values(), default=0))
    return [(name, compute.islands[name]) for turn in turns for name in names if turn < room[name]]


def _home_slots(config: RunConfig) -> int:
    home, asked = home_capacity(config.compute), config.compute.stages.expert
    by_gpu = home.gpus / (asked.gpus * asked.workers) if asked.gpus else float("inf")
    room = min(home.stages, home.cpus / (asked.cpus * asked.workers), by_gpu)
    return int(min(room, config.partition.num_experts))


def _price(
    graph: list[Stage], visits: list[PlannedExecution], compute: ComputeConfig, calibration: Calibration
) -> float:
    place_of = {visit.stage: visit.place for visit in visits}
    found = [estimate(stage, place_of[stage.name], compute, calibration) for stage in graph]
    return sum(one.price for one in found if one is not None)
