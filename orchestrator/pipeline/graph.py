"""From a configuration to the stages of a run: a pure function, so that `ddm plan` can show a run before it starts.

dataset ─► features ─► partition ─┬─► expert_0 … expert_K-1 ─┐
   ├─► codec ─► latents ──┘       ├─► router ────────────────┼─► ensemble ─► score_<selection>
   └─► reference, of codec too    └─► monolith ──────────────┴─► monolith_ensemble ─► score_monolith

A codec that is refined by a network has it trained in `decoder`, beside the stages that only encode; ensembles and the
reference wait for it.

`distill`, `accelerate`, `prune`, `quantize` and `stitch` follow the original ensemble in this order. Each produces a
compressed ensemble with its own score and timing.
The baselines `cluster_conditioned` and `distilled_monolith` are built like the monolith. The second one also reads the
experts. A router with `data=samples` reads `expert_samples`, which the experts generate; the router `density` reads
the experts. The selection `auto` adds a `selection_search` between the ensemble and its score. `ddm finetune` adds
`adapter_images`, and an `adapter_<k>` for each chosen expert.

`ddm extend` adds a data set, its latents and a partition for each delivery of data. The experts before it stay in the
graph as `before_<number>_expert_<k>`, from which those after it begin.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from ensemble.compression.config import compression_label
from ensemble.config import ReplicationLimits, SamplingConfig
from experts.config import ExpertConfig
from orchestrator.config.compute import ResourcesConfig
from orchestrator.config.delivery import DeliveryConfig
from orchestrator.config.finetune import ALL_IMAGES, AdapterStageConfig
from orchestrator.config.schema import RunConfig
from orchestrator.config.stage_kinds import ENGINE_KINDS
from orchestrator.pipeline.stage import Input, Stage
from orchestrator.pipeline.stage_configs import (
    EnsembleStageConfig,
    ExpertStageConfig,
    InitStageConfig,
    ScoreStageConfig,
    build_stage_configs,
)
from router.config import AUTO, SelectionConfig, selection_label

FROM_ENSEMBLE = "from_ensemble"
"""Name of the stage whose artifact is a copy of the ensemble that `--ensemble` names."""

NO_LIMITS = ReplicationLimits()

RANKS = {"decoder": 1, "monolith": 1, "cluster_conditioned": 1, "distilled_monolith": 1}
RANKS |= {"reference": 1, "expert": 2, "router": 3, "score": 4, "timing": 4}
"""Ranks of stages by kind. What others wait for comes first, with the first expert, whose samples are the first to see;
then the longest trainings, which would else run alone at the end."""

_recent_graphs: deque[tuple[RunConfig, tuple[Stage, ...]]] = deque(maxlen=8)
"""The last graphs with their configurations. A command loads its configuration several times; equal configurations
share one graph, and with it the stages' cached fingerprints."""


def build_graph(config: RunConfig) -> list[Stage]:
    """Return all stages of a run, each after its inputs; an equal configuration returns the same stages."""
    for known_config, stages in tuple(_recent_graphs):
        if known_config == config:
            return list(stages)
    stages = tuple(_GraphBuilder(config).build())
    _recent_graphs.append((config, stages))
    return list(stages)


class _GraphBuilder:
    """Adds the stages of one run, each after its inputs."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.num_experts = config, config.partition.num_experts
        self.stage_configs = build_stage_configs(config)
        self.stages: list[Stage] = []
        self.init_stages: dict[str, Stage] = {}
        """Copied checkpoints, by the path from which they are copied."""

    def build(self) -> list[Stage]:
        """Add all stages and return them."""
        dataset = self._add("dataset", self.stage_configs.dataset, {})
        self.shards = Input(stage=dataset, part="train")
        codec = self.config.codec
        self.codec = Input(stage=self._add("codec", codec.encoder, {"shards": self.shards}))
        self.decoder = self.codec
        if codec != codec.encoder:
            self.decoder = Input(stage=self._add("decoder", codec, {"encoder": self.codec, "shards": self.shards}))
        data_inputs = {"dataset": Input(stage=dataset)}
        self.features = Input(stage=self._add("features", self.stage_configs.features, data_inputs))
        latents = self._add("latents", self.stage_configs.latents, data_inputs | {"codec": self.codec})
        self.text = {} if self.config.text.kind == "none" else {"text": Input(stage=latents, part="text")}
        partition_inputs = data_inputs | {"features": self.features, "latents": Input(stage=latents)}
        names = [*(f"before_{number}_partition" for number in range(1, len(self.config.deliveries) + 1)), "partition"]
        partition = self._add("partition", self.config.partition, partition_inputs, names[0], identity="partition")
        self.partitions = [Input(stage=partition)]
        """Before the first delivery, and after each."""
        for number, delivery in enumerate(self.config.deliveries, start=1):
            self._add_delivery(number, delivery, data_inputs["dataset"], names[number])
        self.partition = self.partitions[-1]
        reference_inputs = data_inputs | {"codec": self.decoder}
        self.reference = Input(stage=self._add("reference", self.stage_configs.evaluation, reference_inputs))
        self.weak: dict[str, Input] = {}
        reflection = self.config.ensemble.reflection
        is_weak = reflection is not None and reflection.weak == "monolith"
        if is_weak:
            self.weak = {"weak": Input(stage=self._add_baseline("monolith", self._add_monolith("monolith")))}
        trained = self._add_ensemble()
        self._add_adapters(trained)
        if self.config.has_monolith and not is_weak:
            self._add_baseline("monolith", self._add_monolith("monolith"))
        if "cluster_conditioned" in self.config.baselines:
            self._add_baseline("cluster_conditioned", self._add_monolith("cluster_conditioned"), trained["router"])
        if "distilled_monolith" in self.config.baselines:
            self._add_baseline("distilled_monolith", self._add_distilled_monolith(trained))
        return self.stages

    def _add(
        self,
        kind: str,
        config: object,
        inputs: dict[str, Input],
        name: str = "",
        *,
        optional: bool = False,
        identity: str = "",
    ) -> Stage:
        resources: ResourcesConfig = getattr(self.config.compute.stages, kind)
        stage = Stage(
            name=name or kind,
            kind=kind,
            config=config,
            inputs=inputs,
            resources=resources,
            engine=self.config.data.engine if kind in ENGINE_KINDS else "local",
            optional=optional,
            identity="" if identity == (name or kind) else identity,
            rank=0 if name == "expert_0" else RANKS.get(kind, 0),
        )
        self.stages.append(stage)
        return stage

    def _add_delivery(self, number: int, delivery: DeliveryConfig, earlier: Input, name: str) -> None:
        """Add the stages that read, encode and assign later data."""
        data = replace(self.stage_configs.dataset, path=delivery.path, version=delivery.version, limit=None)
        inputs = {"dataset": Input(stage=self._add("dataset", data, {"earlier": earlier}, f"dataset_{number}"))}
        latents = self._add("latents", self.stage_configs.latents, inputs | {"codec": self.codec}, f"latents_{number}")
        inputs |= {"latents": Input(stage=latents), "earlier": self.partitions[-1]}
        partition = self._add("partition", self.config.partition, inputs, name, identity="partition")
        self.partitions.append(Input(stage=partition))

    def _add_ensemble(self) -> dict[str, Input]:
        """Add experts, router, ensemble, scores and compressions; return the trained models by role."""
        trained: dict[str, Input] = {}
        has_router, router = self.num_experts > 1, self.config.router
        clusters = {"clusters": self._partition_part("latents")}
        if has_router and router.data == "real" and router.kind != "density":
            trained["router"] = self._add_router(clusters)
        experts = {f"expert_{k}": self._add_expert(k) for k in range(self.num_experts)}
        if has_router and router.kind == "density":
            trained["router"] = self._add_router(clusters | experts)
        elif has_router and router.data == "samples":
            inputs = experts | {"partition": self.partition}
            samples = self._add("expert_samples", self.stage_configs.expert_samples, inputs)
            trained["router"] = self._add_router({"expert_samples": Input(stage=samples)})
        trained |= experts
        inputs = {"codec": self.decoder, "shards": self.shards} | self.text | trained
        ensemble = self._add("ensemble", EnsembleStageConfig(expert_ids=tuple(range(self.num_experts))), inputs)
        default = self.config.ensemble.selection
        selections = list(dict.fromkeys((default, *self.config.scores.selections)))
        search_inputs: dict[str, Input] = {}
        if any(selection.name == AUTO for selection in selections):
            search_inputs = {"selection_search": self._add_selection_search(ensemble)}
        for selection in selections:
            self._add_score(f"score_{selection_label(selection)}", ensemble, selection, search_inputs)
        changed = ensemble
        if self.config.from_ensemble:
            changed = self._add_changed_ensemble()
            for selection in selections:
                suffix = "" if selection == default else f"_{selection_label(selection)}"
                self._add_score(f"score_{FROM_ENSEMBLE}{suffix}", changed, selection, search_inputs)
        self._add_compressions(ensemble, changed, search_inputs)
        return trained

    def _add_changed_ensemble(self) -> Stage:
        """Add the ensemble that a command has copied into the run."""
        ids = tuple(range(self.num_experts))
        config = EnsembleStageConfig(expert_ids=ids, content=self.config.from_ensemble)
        return self._add("ensemble", config, {}, FROM_ENSEMBLE)

    def _add_compressions(self, original: Stage, compressed: Stage, search_inputs: dict[str, Input]) -> None:
        """Add the ensemble after each compression, scored with the same selection as the original by default."""
        labels = ["score"]
        for kind, config in self.stage_configs.compressions.items():
            inputs = {
                "ensemble": Input(stage=compressed),
                "original": Input(stage=original),
                "clusters": self._partition_part("latents"),
            }
            held_out = (
                {"held_out": self._partition_part("holdout_latents")} if config.method.method == "truncate" else {}
            )
            compressed = self._add(kind, config, inputs | held_out)
            labels.append(compression_label(config.method))
            self._add_score("_".join(labels), compressed, self.config.ensemble.selection, search_inputs)
            timing_inputs = inputs | {"ensemble": Input(stage=compressed)}
            self._add("timing", self.stage_configs.timing, timing_inputs, "_".join(["timing", *labels[1:]]))

    def _add_adapters(self, trained: Mapping[str, Input]) -> None:
        """Add the adapters of `ddm finetune`; each reads its own images and expert alone."""
        finetune, config = self.config.finetune, self.stage_configs.adapter_images
        if finetune is None or config is None:
            return
        partition = {"partition": self.partition} if finetune.is_routed else {}
        images = self._add("adapter_images", config, {"codec": self.codec} | partition)
        for k in finetune.experts:
            inputs = {
                "expert": trained[f"expert_{k}"],
                "codec": self.codec,
                "images": Input(stage=images, part=str(k) if finetune.is_routed else ALL_IMAGES),
            }
            adapter = AdapterStageConfig(rank=finetune.rank, training=finetune.training)
            self._add("adapter", adapter, inputs, f"adapter_{k}", optional=len(finetune.experts) > 1)

    def _add_selection_search(self, ensemble: Stage) -> Input:
        inputs = {"ensemble": Input(stage=ensemble), "reference": self.reference} | self.weak
        return Input(stage=self._add("selection_search", self.stage_configs.selection_search, inputs))

    def _add_router(self, data: dict[str, Input]) -> Input:
        inputs = {"codec": self.codec, **data, "holdouts": self._partition_part("holdout_latents")}
        return Input(stage=self._add("router", self.config.router, inputs))

    def _add_expert(self, k: int) -> Input:
        """Add an expert, once for the first data and once for each delivery, and return the last."""
        expert, init = self._split_init(self.stage_configs.experts[k])
        steps, identity = (
            [expert.training.steps, *(delivery.steps for delivery in self.config.deliveries)],
            f"expert_{k}",
        )
        for number, partition in enumerate(self.partitions, start=1):
            training = replace(expert.training, steps=steps[number - 1])
            inputs = {"latents": replace(partition, part=f"latents/{k}"), "codec": self.codec} | init
            if training.held_out_every is not None:  # of the same artifact as its latents
                inputs["holdout"] = replace(partition, part=f"holdout_latents/{k}", is_hashed=False)
            config = ExpertStageConfig(
                expert=replace(expert, training=training), cluster_id=k, validation=self.config.validation
            )
            name = identity if number == len(self.partitions) else f"before_{number}_{identity}"
            stage = self._add("expert", config, inputs, name, optional=self.num_experts > 1, identity=identity)
            init = {"init": Input(stage=stage)}
        return Input(stage=stage)

    def _add_monolith(self, kind: str) -> Stage:
        """Add the monolith or the cluster-conditioned one, each with as many FLOPs as our whole side."""
        config = self.stage_configs.monolith
        expert, init = self._split_init(config.expert)
        for k in range(len(config.experts)):
            _, expert_init = self._split_init(self.stage_configs.experts[k])
            init |= {f"init_{k}": checkpoint for checkpoint in expert_init.values()}
        inputs = {"codec": self.codec, "partition": self.partitions[0], "features": self.features}
        return self._add(kind, replace(config, expert=expert), inputs | init)

    def _add_distilled_monolith(self, trained: dict[str, Input]) -> Stage:
        config = self.stage_configs.distilled_monolith
        expert, init = self._split_init(config.expert)
        if config.from_expert is not None:
            init = {"init": trained[f"expert_{config.from_expert}"]}
        teachers = {role: model for role, model in trained.items() if role != "router"}
        inputs = {"codec": self.codec, "partition": self.partition} | teachers | init
        return self._add("distilled_monolith", replace(config, expert=expert), inputs)

    def _add_baseline(self, name: str, trained: Stage, router: Input | None = None) -> Stage:
        """Assemble a baseline as an ensemble and score it; with a router, each sample's cluster is chosen once.

        Return the stage that assembles it. Baselines are scored without reflection.
        """
        models, count = {"expert_0": Input(stage=trained)}, 1
        if router is not None:
            models, count = {name: Input(stage=trained), "router": router}, self.num_experts
        inputs = {"codec": self.decoder, "shards": self.shards} | self.text | models
        config = EnsembleStageConfig(expert_ids=tuple(range(count)))
        ensemble = self._add("ensemble", config, inputs, f"{name}_ensemble")
        sampling = replace(
            self.config.ensemble, selection=SelectionConfig(name="sticky" if router else "full"), reflection=None
        )
        self._add_score_of(f"score_{name}", ensemble, sampling)
        return ensemble

    def _add_score(
        self,
        name: str,
        ensemble: Stage,
        selection: SelectionConfig,
        search_inputs: Mapping[str, Input] = MappingProxyType({}),
    ) -> None:
        """Score an ensemble; the selection `auto` needs the search."""
        sampling = replace(self.config.ensemble, selection=selection)
        extra = self.weak | (dict(search_inputs) if selection.name == AUTO else {})
        scores = self.config.scores
        limits = ReplicationLimits(max_copy_rate=scores.max_copy_rate, max_membership_auc=scores.max_membership_auc)
        self._add_score_of(name, ensemble, sampling, extra, limits)

    def _add_score_of(
        self,
        name: str,
        ensemble: Stage,
        sampling: SamplingConfig,
        extra_inputs: Mapping[str, Input] = MappingProxyType({}),
        limits: ReplicationLimits = NO_LIMITS,
    ) -> None:
        inputs = {"ensemble": Input(stage=ensemble), "reference": self.reference, "partition": self.partition}
        config = ScoreStageConfig(evaluation=self.stage_configs.evaluation, sampling=sampling, limits=limits)
        self._add("score", config, inputs | dict(extra_inputs), name)

    def _split_init(self, expert: ExpertConfig) -> tuple[ExpertConfig, dict[str, Input]]:
        """Return the configuration without its checkpoint's path, and the checkpoint's copy as an input."""
        if expert.init is None:
            return expert, {}
        if expert.init not in self.init_stages:
            config = InitStageConfig(folder=expert.init, checksum=expert.init_checksum)
            self.init_stages[expert.init] = self._add("init", config, {}, f"init_{len(self.init_stages)}")
        return replace(expert, init=None, init_checksum=""), {"init": Input(stage=self.init_stages[expert.init])}

    def _partition_part(self, part: str) -> Input:
        return replace(self.partition, part=part)
