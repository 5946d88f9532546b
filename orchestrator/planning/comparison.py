"""The experts on their islands against one monolith on the same machines, joined into one Ray cluster."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from orchestrator.compute_config import HOME, ComputeConfig, IslandConfig, ResourcesConfig
from orchestrator.config import RunConfig
from orchestrator.costs import share_of
from orchestrator.graph import build_graph
from orchestrator.planning.calibration import Calibration
from orchestrator.planning.estimate import estimate
from orchestrator.planning.schedule import Visit, home_capacity, walk
from orchestrator.planning.synchronised import Synchronised, Worker, synchronise
from orchestrator.stage import Stage

OURS = ("expert", "router")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Training alone, baseline and scores left out."""

    experts_s: float
    """From the first expert's or the router's first step to the last one's end; starts of processes left out."""
    experts_price: float
    monolith: Synchronised
    """On as many workers as experts can train at once, every one as quick as it is for an expert."""


def compare(
    config: RunConfig,
    calibration: Calibration,
    seconds: Callable[[Stage, str], float],
    start_s: Mapping[str, float],
) -> Comparison | None:
    """None where the speed of a machine is not known."""
    workers = available_workers(config, calibration)
    if not workers:
        return None
    graph = [stage for stage in build_graph(replace(config, monolith=False)) if stage.kind in OURS]
    alone = [replace(stage, inputs={}) for stage in graph]
    visits = walk(alone, (), config.compute, seconds, {})
    training = config.expert.training
    return Comparison(
        experts_s=max(visit.ends_s for visit in visits),
        experts_price=_price(alone, visits, config.compute, calibration),
        monolith=synchronise(
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
    slots = _island_slots(compute, asked) if compute.islands else [(HOME, None)] * _home_slots(config)
    measured = {name: place.speeds["expert"] for name, place in calibration.places.items() if "expert" in place.speeds}
    if any(name not in measured for name, _ in slots):
        return []
    return [
        Worker(
            images_per_s=asked.workers / measured[name].unit_s,
            price_per_hour=island.price_per_hour * share_of(island, asked) if island else 0.0,
            losses_per_hour=island.losses_per_hour * asked.workers if island else 0.0,
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


def _price(graph: list[Stage], visits: list[Visit], compute: ComputeConfig, calibration: Calibration) -> float:
    place_of = {visit.stage: visit.place for visit in visits}
    found = [estimate(stage, place_of[stage.name], compute, calibration) for stage in graph]
    return sum(one.price for one in found if one is not None)
