"""From a configuration to the stages of a run: a pure function, so that `ddm plan` can show what would happen.

dataset ─► features ─► partition ─┬─► expert_0 … expert_K-1 ─┐
   │                              ├─► router ────────────────┼─► ensemble ─► score_<selection>
   ├─► codec ─────────────────────┤                          │
   └─► reference (for the scores) └─► monolith ──────────────┴─► monolith_ensemble ─► score_monolith
"""

from dataclasses import fields, replace
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from artifacts import STRICT
from data_partition.config import PartitionConfig
from ensemble.config import EvaluationConfig, SamplingConfig
from experts.config import ExpertConfig, TrainingConfig
from orchestrator.compute_config import ResourcesConfig
from orchestrator.config import RunConfig
from orchestrator.stage import Input, Stage
from router.config import RouterConfig, SelectionConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExpertStageConfig:
    """One expert of a run."""

    expert: ExpertConfig
    """Its recipe; the batch is already divided by K."""
    cluster_id: Annotated[int, Field(ge=0)]
    """The cluster that it learns, which is also its own id."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MonolithStageConfig:
    """The baseline: one expert on everything, given as many FLOPs as all experts, the router and the clustering."""

    expert: ExpertConfig
    """The experts' recipe with the whole global batch."""
    router: RouterConfig | None
    """The router whose training is worth some more steps; None if the run has no router."""
    num_experts: int
    """K, which the router's size depends on."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AssemblyStageConfig:
    """An ensemble that is put together."""

    expert_ids: tuple[int, ...]
    """The experts that it should have; those that are not among the inputs are missing."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScoreStageConfig:
    """One row of the table of scores."""

    evaluation: EvaluationConfig
    """How many samples, which spaces."""
    sampling: SamplingConfig
    """How they are drawn."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NothingConfig:
    """A stage of no work, by which the orchestrator's own cost is measured."""

    number: int = 0
    """Tells one from another."""


def build_graph(config: RunConfig) -> list[Stage]:
    """All stages of a run, every one behind its inputs."""
    return _Graph(config).stages


def plain_evaluation(config: RunConfig) -> EvaluationConfig:
    """The evaluation's own part of `scores`, without the selections."""
    scores = config.scores
    return EvaluationConfig(**{field.name: getattr(scores, field.name) for field in fields(EvaluationConfig)})


def row_name(selection: SelectionConfig) -> str:
    """A selection's name in stage names and tables, with the number it depends on."""
    numbers = {
        "top_k": f"_{selection.k}",
        "threshold": f"_{selection.probability:g}",
        "nucleus": f"_{selection.total:g}",
        "sample": f"_{selection.draws}",
        "anneal": f"_{selection.t_switch:g}",
    }
    return selection.name + numbers.get(selection.name, "")


class _Graph:
    """The stages so far, in the order in which they were added."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.stages: list[Stage] = []
        dataset = self._add("dataset", config.data, {})
        self.shards = Input(stage=dataset, part="train")
        codec = self._add("codec", config.codec, {"shards": self.shards})
        features = self._add("features", _features_only(config.partition), {"dataset": Input(stage=dataset)})
        self.partition = self._add(
            "partition",
            config.partition,
            {"dataset": Input(stage=dataset), "features": Input(stage=features)},
        )
        self.reference = self._add("reference", plain_evaluation(config), {"dataset": Input(stage=dataset)})
        self._add_ensemble(codec)
        if config.monolith:
            self._add_monolith(codec, features)

    def _add(
        self, kind: str, config: object, inputs: dict[str, Input], name: str = "", *, optional: bool = False
    ) -> Stage:
        resources: ResourcesConfig = getattr(self.config.compute.stages, kind)
        stage = Stage(
            name=name or kind, kind=kind, config=config, inputs=inputs, resources=resources, optional=optional
        )
        self.stages.append(stage)
        return stage

    def _add_ensemble(self, codec: Stage) -> None:
        config, num_experts = self.config, self.config.partition.num_experts
        inputs = {"codec": Input(stage=codec), "shards": self.shards}
        if num_experts > 1:
            clusters = {
                "clusters": Input(stage=self.partition, part="clusters"),
                "holdouts": Input(stage=self.partition, part="holdout"),
            }
            inputs["router"] = Input(stage=self._add("router", config.router, {"codec": Input(stage=codec)} | clusters))
        for k in range(num_experts):
            expert = self._add(
                "expert",
                ExpertStageConfig(expert=self._expert(num_experts), cluster_id=k),
                {"shards": Input(stage=self.partition, part=f"clusters/{k}"), "codec": Input(stage=codec)},
                f"expert_{k}",
                optional=num_experts > 1,
            )
            inputs[expert.name] = Input(stage=expert)
        ensemble = self._add("ensemble", AssemblyStageConfig(expert_ids=tuple(range(num_experts))), inputs)
        for selection in dict.fromkeys((config.ensemble.selection, *config.scores.selections)):
            self._add_score(f"score_{row_name(selection)}", ensemble, selection)

    def _add_monolith(self, codec: Stage, features: Stage) -> None:
        config, num_experts = self.config, self.config.partition.num_experts
        recipe = MonolithStageConfig(
            expert=config.expert, router=_cost_only(config.router) if num_experts > 1 else None, num_experts=num_experts
        )
        inputs = {
            "codec": Input(stage=codec),
            "partition": Input(stage=self.partition),
            "features": Input(stage=features),
        }
        monolith = self._add("monolith", recipe, inputs)
        assembled = self._add(
            "ensemble",
            AssemblyStageConfig(expert_ids=(0,)),
            {"codec": Input(stage=codec), "shards": self.shards, "expert_0": Input(stage=monolith)},
            "monolith_ensemble",
        )
        self._add_score("score_monolith", assembled, SelectionConfig(name="full"))

    def _add_score(self, name: str, ensemble: Stage, selection: SelectionConfig) -> None:
        config = ScoreStageConfig(
            evaluation=plain_evaluation(self.config),
            sampling=replace(self.config.ensemble, selection=selection),
        )
        inputs = {
            "ensemble": Input(stage=ensemble),
            "reference": Input(stage=self.reference),
            "partition": Input(stage=self.partition),
        }
        self._add("score", config, inputs, name)

    def _expert(self, num_experts: int) -> ExpertConfig:
        training = self.config.expert.training
        return replace(self.config.expert, training=replace(training, batch_size=training.batch_size // num_experts))


def _features_only(config: PartitionConfig) -> PartitionConfig:
    """What the features depend on; the rest is set to its default, so that another K finds them finished."""
    return PartitionConfig(
        features=config.features, components=config.components, batch_size=config.batch_size, seed=config.seed
    )


def _cost_only(config: RouterConfig) -> RouterConfig:
    """What the router's FLOPs depend on; the rest is set to its default, so that it does not touch the monolith."""
    training = TrainingConfig(steps=config.training.steps, batch_size=config.training.batch_size)
    return replace(config, path="straight", training=training)
