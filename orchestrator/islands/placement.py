"""Which island runs a stage now: a pure function of what is asked, what there is, and what is in use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.config.compute import CONTROLLER, ComputeConfig, IslandConfig, ResourcesConfig
from orchestrator.errors import ConfigError
from orchestrator.run.backend import Job

TRAININGS = ("expert", "router", "monolith", "cluster_conditioned", "distilled_monolith")
"""Kinds of stages that go to islands unless the configuration says otherwise; all others stay at home."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What of an island is in use."""

    cpus: float = 0.0
    gpus: float = 0.0
    memory_gb: float = 0.0
    is_reachable: bool = True
    held: frozenset[str] = frozenset()
    """Stages that were on this island before, so that their inputs and checkpoints lie in its storage."""


def load_of(jobs: Sequence[Job], *, is_reachable: bool = True, held: frozenset[str] = frozenset()) -> Load:
    """What jobs use together."""
    asked = [job.resources for job in jobs]
    return Load(
        cpus=sum(one.cpus * one.workers for one in asked),
        gpus=sum(one.gpus * one.workers for one in asked),
        memory_gb=sum(one.memory_gb * one.workers for one in asked),
        is_reachable=is_reachable,
        held=held,
    )


def allowed_islands(job: Job, config: ComputeConfig) -> tuple[str, ...]:
    """The islands that may run the job at all, after too many losses only those that are not preemptible.

    Raises `ConfigError` if none of them is ever large enough.
    """
    named = job.resources.islands or (tuple(config.islands) if job.kind in TRAININGS else (CONTROLLER,))
    if CONTROLLER in named:
        return (CONTROLLER,)
    fitting = [name for name in named if _fits(job.resources, config.islands[name], Load())]
    if not fitting:
        sizes = {name: config.islands[name] for name in named}
        largest = ", ".join(f"{name} {size.cpus} CPUs {size.gpus:g} GPUs" for name, size in sizes.items())
        asked = job.resources
        raise ConfigError(
            f"stage {job.stage} asks for {asked.workers} x {asked.cpus} CPUs, {asked.gpus:g} GPUs, {asked.memory_gb:g} "
            f"GB and no island is that large ({largest}); change compute.stages.{job.kind} or compute.islands"
        )
    firm = [name for name in fitting if not config.islands[name].preemptible]
    return tuple(firm) if firm and job.preemption_count >= config.max_spot_preemptions else tuple(fitting)


def place(job: Job, config: ComputeConfig, loads: Mapping[str, Load]) -> str | None:
    """The island that should run the job now; None if all that may are full or do not answer.

    One that holds the stage's checkpoints comes first, then the cheapest, then the emptiest.
    """
    free = [
        name
        for name in allowed_islands(job, config)
        if name == CONTROLLER or (loads[name].is_reachable and _fits(job.resources, config.islands[name], loads[name]))
    ]
    return min(free, key=lambda name: _rank(job, config, loads, name)) if free else None


def _rank(job: Job, config: ComputeConfig, loads: Mapping[str, Load], name: str) -> tuple[bool, float, float]:
    if name == CONTROLLER:
        return False, 0.0, 0.0
    island, load = config.islands[name], loads[name]
    size = max(island.gpus, 0.0) or island.cpus
    return job.stage not in load.held, island.price_per_hour / size, load.cpus / island.cpus


def _fits(asked: ResourcesConfig, island: IslandConfig, load: Load) -> bool:
    """Whether what is asked fits into what is free."""
    return (
        asked.cpus * asked.workers <= island.cpus - load.cpus
        and asked.gpus * asked.workers <= island.gpus - load.gpus + 1e-9
        and (not island.memory_gb or asked.memory_gb * asked.workers <= island.memory_gb - load.memory_gb)
    )
