"""Choose the island that runs a stage now: a pure function of requested, total and used resources."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.config.compute import CONTROLLER, ComputeConfig, IslandConfig, ResourcesConfig
from orchestrator.config.stage_kinds import TRAINING_KINDS
from orchestrator.errors import ConfigError
from orchestrator.run.backend import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Resources of an island that are in use."""

    cpus: float = 0.0
    gpus: float = 0.0
    memory_gb: float = 0.0
    is_reachable: bool = True
    stored_stages: frozenset[str] = frozenset()
    """Stages that were on this island before, so its storage has their inputs and checkpoints."""


def compute_load(
    jobs: Sequence[Job], *, is_reachable: bool = True, stored_stages: frozenset[str] = frozenset()
) -> Load:
    """Sum the resources that jobs use."""
    requests = [job.resources for job in jobs]
    return Load(
        cpus=sum(request.cpus * request.workers for request in requests),
        gpus=sum(request.gpus * request.workers for request in requests),
        memory_gb=sum(request.memory_gb * request.workers for request in requests),
        is_reachable=is_reachable,
        stored_stages=stored_stages,
    )


def list_allowed_islands(job: Job, config: ComputeConfig) -> tuple[str, ...]:
    """Return the islands that may run the job; after too many preemptions only those that are not preemptible.

    Raises `ConfigError` if none of them is large enough.
    """
    candidates = job.resources.islands or (tuple(config.islands) if job.kind in TRAINING_KINDS else (CONTROLLER,))
    if CONTROLLER in candidates:
        return (CONTROLLER,)
    fitting = [name for name in candidates if _fits(job.resources, config.islands[name], Load())]
    if not fitting:
        sizes = {name: config.islands[name] for name in candidates}
        largest = ", ".join(f"{name} {size.cpus} CPUs {size.gpus:g} GPUs" for name, size in sizes.items())
        request = job.resources
        raise ConfigError(
            f"stage {job.stage} requests {request.workers} x {request.cpus} CPUs, {request.gpus:g} GPUs, "
            f"{request.memory_gb:g} GB and no island is that large ({largest}); change compute.stages.{job.kind} or "
            "compute.islands"
        )
    on_demand = [name for name in fitting if not config.islands[name].preemptible]
    needs_on_demand = on_demand and job.preemption_count >= config.max_spot_preemptions
    return tuple(on_demand) if needs_on_demand else tuple(fitting)


def place(job: Job, config: ComputeConfig, loads: Mapping[str, Load]) -> str | None:
    """Return the island that should run the job now; None if all allowed ones are full or unreachable.

    An island with the stage's checkpoints in its storage is first, then the cheapest, then the least loaded.
    """
    free = [
        name
        for name in list_allowed_islands(job, config)
        if name == CONTROLLER or (loads[name].is_reachable and _fits(job.resources, config.islands[name], loads[name]))
    ]
    return min(free, key=lambda name: _rank(job, config, loads, name)) if free else None


def _rank(job: Job, config: ComputeConfig, loads: Mapping[str, Load], name: str) -> tuple[bool, float, float]:
    if name == CONTROLLER:
        return False, 0.0, 0.0
    island, load = config.islands[name], loads[name]
    size = max(island.gpus, 0.0) or island.cpus
    return job.stage not in load.stored_stages, island.price_per_hour / size, load.cpus / island.cpus


def _fits(request: ResourcesConfig, island: IslandConfig, load: Load) -> bool:
    """Return whether the requested resources fit into the remaining ones."""
    return (
        request.cpus * request.workers <= island.cpus - load.cpus
        and request.gpus * request.workers <= island.gpus - load.gpus + 1e-9
        and (not island.memory_gb or request.memory_gb * request.workers <= island.memory_gb - load.memory_gb)
    )
