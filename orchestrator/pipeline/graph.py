"""From a configuration to the stages of a run: a pure function, so that `ddm plan` can show what would happen.

dataset ─► features ─► partition ─┬─► expert_0 … expert_K-1 ─┐
   │                              ├─► router ────────────────┼─► ensemble ─► score_<selection>
   ├─► codec ─────────────────────┤                          │
   └─► reference (for the scores) └─► monolith ──────────────┴─► monolith_ensemble ─► score_monolith

`distill`, `accelerate`, `prune`, `quantize` and `switch` put faster and smaller ensembles behind the whole one, each
with a score and a timing of its own.
The baselines `told` and `student` stand where the monolith does; the student waits for the experts. A router with
`data=samples` waits for `draws`, and those for the experts. The selection `auto` puts a `choice` between the ensemble
and its score.
"""

from collections.abc import Mapping
from dataclasses import field, fields, replace
from types import MappingProxyType
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from ddm_core.artifacts import STRICT, UNHASHED_IF_DEFAULT
from ensemble.compression.config import CompressionConfig, TimingConfig, compression_label
from ensemble.config import EvaluationConfig, SamplingConfig, SelectionSearchConfig
from experts.config import ExpertConfig
from orchestrator.config.compute import ResourcesConfig
from orchestrator.config.schema import RunConfig
from orchestrator.pipeline.stage import Input, Stage
from orchestrator.pipeline.stage_configs import (
    DistilledMonolithStageConfig,
    InitStageConfig,
    compression_configs,
    distilled_monolith_config,
    expert_samples_config,
    features_only,
    monolith_config,
    router_cost,
    router_costs,
)
from router.config import AUTO, RouterConfig, SelectionConfig, selection_label


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
    experts: tuple[ExpertConfig, ...] = field(default=(), metadata=UNHASHED_IF_DEFAULT)
    """What each expert's FLOPs depend on; empty if all cost the same."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EnsembleStageConfig:
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
class SelectionSearchStageConfig:
    """The choice of a selection."""

    choice: SelectionSearchConfig
    """The candidates, and how they are tried."""
    evaluation: EvaluationConfig
    """In which spaces they are compared."""
    sampling: SamplingConfig
    """How they are drawn; each has a selection of its own."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NothingConfig:
    """A stage of no work, by which the orchestrator's own cost is measured."""

    number: int = 0
    """Tells one from another."""


def build_graph(config: RunConfig) -> list[Stage]:
    """All stages of a run, every one behind its inputs."""
    return _GraphBuilder(config).stages


def plain_evaluation(config: RunConfig) -> EvaluationConfig:
    """The evaluation's own part of `scores`, without the selections."""
    scores = config.scores
    return EvaluationConfig(**{field.name: getattr(scores, field.name) for field in fields(EvaluationConfig)})


class _GraphBuilder:
    """The stages so far, in the order in which they were added."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.stages: list[Stage] = []
        self.inits: dict[str, Stage] = {}
        dataset = self._add("dataset", config.data, {})
        self.shards = Input(stage=dataset, part="train")
        codec = self._add("codec", config.codec, {"shards": self.shards})
        features = self._add("features", features_only(config.partition), {"dataset": Input(stage=dataset)})
        self.partition = self._add(
            "partition",
            config.partition,
            {"dataset": Input(stage=dataset), "features": Input(stage=features)},
        )
        self.reference = self._add("reference", plain_evaluation(config), {"dataset": Input(stage=dataset)})
        self.codec, self.features = Input(stage=codec), Input(stage=features)
        trained = self._add_ensemble()
        if config.monolith:
            self._add_baseline("monolith", self._add_monolith("monolith"))
        if "cluster_conditioned" in config.baselines:
            self._add_baseline("cluster_conditioned", self._add_monolith("cluster_conditioned"), trained["router"])
        if "distilled_monolith" in config.baselines:
            self._add_baseline("distilled_monolith", self._add_distilled_monolith(trained))

    def _add(
        self, kind: str, config: object, inputs: dict[str, Input], name: str = "", *, optional: bool = False
    ) -> Stage:
        resources: ResourcesConfig = getattr(self.config.compute.stages, kind)
        stage = Stage(
            name=name or kind, kind=kind, config=config, inputs=inputs, resources=resources, optional=optional
        )
        self.stages.append(stage)
        return stage

    def _add_ensemble(self) -> dict[str, Input]:
        """The experts, the router, and what they are together; returns the trained ones by role."""
        config, num_experts = self.config, self.config.partition.num_experts
        trained: dict[str, Input] = {}
        if num_experts > 1 and config.router.data == "real":
            trained["router"] = self._add_router("clusters", Input(stage=self.partition, part="clusters"))
        experts = {f"expert_{k}": self._add_expert(k) for k in range(num_experts)}
        if num_experts > 1 and config.router.data == "samples":
            inputs = experts | {"partition": Input(stage=self.partition)}
            trained["router"] = self._add_router(
                "expert_samples", Input(stage=self._add("expert_samples", expert_samples_config(config), inputs))
            )
        trained |= experts
        inputs = {"codec": self.codec, "shards": self.shards} | trained
        ensemble = self._add("ensemble", EnsembleStageConfig(expert_ids=tuple(range(num_experts))), inputs)
        for selection in dict.fromkeys((config.ensemble.selection, *config.scores.selections)):
            chosen = {"selection_search": self._add_selection_search(ensemble)} if selection.name == AUTO else {}
            self._add_score(f"score_{selection_label(selection)}", ensemble, selection, chosen)
        self._add_compression_stages(ensemble)
        return trained

    def _add_compression_stages(self, whole: Stage) -> None:
        """The ensemble after each stage that makes it smaller, scored as the whole one is by default."""
        selection, is_auto = self.config.ensemble.selection, self.config.ensemble.selection.name == AUTO
        known = SelectionConfig() if is_auto else selection
        sampling = replace(self.config.ensemble, selection=known, reflection=None)
        choices = [stage for stage in self.stages if stage.kind == "selection_search"]
        chosen = {"selection_search": Input(stage=choices[0])} if is_auto else {}
        labelled = self.config.expert.training.condition_dropout < 1
        smaller, labels = whole, ["score"]
        for kind, recipe in compression_configs(self.config).items():
            inputs = {
                "ensemble": Input(stage=smaller),
                "whole": Input(stage=whole),
                "clusters": Input(stage=self.partition, part="clusters"),
            }
            smaller = self._add(kind, CompressionConfig(method=recipe, sampling=sampling, labelled=labelled), inputs)
            labels.append(compression_label(recipe))
            self._add_score("_".join(labels), smaller, selection, chosen)
            both = {"ensemble": Input(stage=smaller), "whole": Input(stage=whole)}
            self._add("timing", TimingConfig(sampling=sampling), both, "_".join(["timing", *labels[1:]]))

    def _add_selection_search(self, ensemble: Stage) -> Input:
        """What `auto` stands for; with a single expert, all selections are one."""
        config = self.config
        few = config.selection_search.candidates[: 1 if config.partition.num_experts == 1 else None]
        recipe = SelectionSearchStageConfig(
            choice=replace(config.selection_search, candidates=few),
            evaluation=plain_evaluation(config),
            sampling=replace(config.ensemble, selection=SelectionConfig()),
        )
        inputs = {"ensemble": Input(stage=ensemble), "reference": Input(stage=self.reference)}
        return Input(stage=self._add("selection_search", recipe, inputs))

    def _add_router(self, role: str, data: Input) -> Input:
        holdouts = Input(stage=self.partition, part="holdout")
        inputs = {"codec": self.codec, role: data, "holdouts": holdouts}
        return Input(stage=self._add("router", self.config.router, inputs))

    def _add_expert(self, k: int) -> Input:
        expert, start = self._started(monolith_config(self.config, k))
        inputs = {"shards": Input(stage=self.partition, part=f"clusters/{k}"), "codec": self.codec} | start
        recipe = ExpertStageConfig(expert=expert, cluster_id=k)
        is_optional = self.config.partition.num_experts > 1
        return Input(stage=self._add("expert", recipe, inputs, f"expert_{k}", optional=is_optional))

    def _add_monolith(self, kind: str) -> Stage:
        """The monolith, or the one that is told the cluster: each is given as many FLOPs as all on our side."""
        config, num_experts = self.config, self.config.partition.num_experts
        (expert, start), costs = self._started(config.expert), router_costs(config)
        for k in range(len(costs)):
            start |= {f"init_{k}": given for given in self._started(monolith_config(config, k))[1].values()}
        recipe = MonolithStageConfig(
            expert=expert,
            router=router_cost(config.router) if num_experts > 1 else None,
            num_experts=num_experts,
            experts=costs,
        )
        inputs = {"codec": self.codec, "partition": Input(stage=self.partition), "features": self.features}
        return self._add(kind, recipe, inputs | start)

    def _add_distilled_monolith(self, trained: dict[str, Input]) -> Stage:
        expert, start = self._started(distilled_monolith_config(self.config))
        chosen = self.config.distilled_monolith.from_expert
        if chosen is not None:
            start = {"init": trained[f"expert_{chosen}"]}
        teachers = {role: given for role, given in trained.items() if role != "router"}
        inputs = {"codec": self.codec, "partition": Input(stage=self.partition)} | teachers | start
        return self._add("distilled_monolith", DistilledMonolithStageConfig(expert=expert, from_expert=chosen), inputs)

    def _add_baseline(self, name: str, trained: Stage, router: Input | None = None) -> None:
        """Put a baseline into a pipeline of its own and score it; with a router, its clusters are drawn once."""
        inputs, count = {"codec": self.codec, "shards": self.shards, "expert_0": Input(stage=trained)}, 1
        if router is not None:
            inputs = {"codec": self.codec, "shards": self.shards, name: Input(stage=trained), "router": router}
            count = self.config.partition.num_experts
        recipe = EnsembleStageConfig(expert_ids=tuple(range(count)))
        assembled = self._add("ensemble", recipe, inputs, f"{name}_ensemble")
        self._add_score(f"score_{name}", assembled, SelectionConfig(name="sticky" if router else "full"))

    def _started(self, expert: ExpertConfig) -> tuple[ExpertConfig, dict[str, Input]]:
        """The recipe without the place of its checkpoint, and that checkpoint as an input."""
        if expert.init is None:
            return expert, {}
        if expert.init not in self.inits:
            recipe = InitStageConfig(folder=expert.init, checksum=expert.init_checksum)
            self.inits[expert.init] = self._add("init", recipe, {}, f"init_{len(self.inits)}")
        return replace(expert, init=None, init_checksum=""), {"init": Input(stage=self.inits[expert.init])}

    def _add_score(
        self, name: str, ensemble: Stage, selection: SelectionConfig, more: Mapping[str, Input] = MappingProxyType({})
    ) -> None:
        config = ScoreStageConfig(
            evaluation=plain_evaluation(self.config),
            sampling=replace(self.config.ensemble, selection=selection),
        )
        inputs = {
            "ensemble": Input(stage=ensemble),
            "reference": Input(stage=self.reference),
            "partition": Input(stage=self.partition),
        }
        self._add("score", config, inputs | dict(more), name)
