"""Which part of a run's configuration a stage depends on; the rest must not reach its fingerprint."""

from dataclasses import replace
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from data_partition.config import PartitionConfig
from ddm_core.artifacts import STRICT
from ensemble.compression.config import MethodConfig
from ensemble.config import ExpertSamplesConfig
from experts.config import ExpertConfig, TrainingConfig
from orchestrator.config.schema import RunConfig
from router.config import RouterConfig

COMPRESSION_KINDS = ("distill", "accelerate", "prune", "quantize", "stitch")
"""Kinds of stages that make an ensemble smaller or faster, in their order: a cache needs many steps to save some of,
pruning is measured on the steps that are left, and what is rounded can no longer be trained."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DistilledMonolithStageConfig:
    """One network that learns from all experts."""

    expert: ExpertConfig
    """Its recipe."""
    from_expert: Annotated[int, Field(ge=0)] | None
    """The expert that it starts from."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class InitStageConfig:
    """A checkpoint to start from, copied into the run."""

    folder: str
    """Where it lies."""
    checksum: str
    """What was in it when the run was composed."""


def monolith_config(config: RunConfig, expert_id: int) -> ExpertConfig:
    """One expert's recipe with its part of the global batch."""
    return _divided(config.experts.get(expert_id, config.expert), config.partition.num_experts)


def router_costs(config: RunConfig) -> tuple[ExpertConfig, ...]:
    """What the FLOPs of each expert depend on, a checkpoint left out; empty if all cost the same."""
    recipes = [monolith_config(config, k) for k in range(config.partition.num_experts)]
    base, costs = _divided(config.expert, config.partition.num_experts), tuple(map(_cost, recipes))
    are_alike = set(costs) == {_cost(base)} and {one.init for one in recipes} == {base.init}
    return () if are_alike else costs


def _divided(expert: ExpertConfig, num_experts: int) -> ExpertConfig:
    return replace(expert, training=replace(expert.training, batch_size=expert.training.batch_size // num_experts))


def _cost(expert: ExpertConfig) -> ExpertConfig:
    training = TrainingConfig(steps=expert.training.steps, batch_size=expert.training.batch_size)
    return ExpertConfig(network=expert.network, training=training)


def distilled_monolith_config(config: RunConfig) -> ExpertConfig:
    """The monolith's recipe with what the student has of its own."""
    training, own = config.expert.training, config.distilled_monolith
    steps, batch_size = own.steps or training.steps, own.batch_size or training.batch_size
    return replace(config.expert, training=replace(training, steps=steps, batch_size=batch_size))


def expert_samples_config(config: RunConfig) -> ExpertSamplesConfig:
    """How the experts are drawn from for the router."""
    router, sampling = config.router, config.ensemble
    return ExpertSamplesConfig(
        samples_per_expert=router.samples_per_expert,
        steps=router.sample_steps,
        noise_schedule=router.noise_schedule,
        batch_size=sampling.batch_size,
        device=sampling.device,
        seed=router.training.seed,
    )


def features_only(config: PartitionConfig) -> PartitionConfig:
    """What the features depend on; the rest is set to its default, so that another K finds them finished."""
    return PartitionConfig(
        features=config.features, components=config.components, batch_size=config.batch_size, seed=config.seed
    )


def router_cost(config: RouterConfig) -> RouterConfig:
    """What the router's FLOPs depend on; the rest is set to its default, so that it does not touch the monolith."""
    training = TrainingConfig(steps=config.training.steps, batch_size=config.training.batch_size)
    return replace(config, noise_schedule="rectified_flow", training=training)


def compression_configs(config: RunConfig) -> dict[str, MethodConfig]:
    """The stages that make the ensemble smaller, by kind and in their order."""
    asked = {kind: getattr(config, kind) for kind in COMPRESSION_KINDS}
    return {kind: recipe for kind, recipe in asked.items() if recipe is not None}
