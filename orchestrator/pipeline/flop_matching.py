"""How many steps a baseline may take: as many as are worth all FLOPs that our side spends on training."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data_partition.shards.shards import read_index
from ddm_core.artifacts import read_manifest
from ensemble.sampling.expert_samples import expert_samples_flops, proportional_counts, sample_counts
from experts.codecs.registry import load_codec
from experts.config import ExpertConfig
from experts.expert import expert_flops
from experts.training.flops import training_flops
from orchestrator.pipeline.graph import MonolithStageConfig
from router.config import RouterConfig
from router.train import router_flops

Inputs = Mapping[str, Path]


def flop_matched_config(config: MonolithStageConfig, inputs: Inputs) -> ExpertConfig:
    """The monolith's recipe, with extra steps for the router, the clustering, and what experts cost that differ."""
    latent_shape = load_codec(inputs["codec"]).latent_shape
    num_classes = len(read_index(by_cluster(inputs["partition"] / "clusters")[0]).class_names)
    expert, training = with_pretrained(config.expert, inputs), config.expert.training
    whole = expert_flops(expert, latent_shape, num_classes)
    own = [with_pretrained(one, inputs, f"init_{k}") for k, one in enumerate(config.experts)]
    ours = [expert_flops(one, latent_shape, num_classes) for one in own]
    overhead = read_manifest(inputs["features"]).flops + read_manifest(inputs["partition"]).flops
    if config.router is not None:
        overhead += router_flops(config.router, latent_shape, num_classes, config.num_experts)
        if config.router.data == "samples":
            costs = zip(own, ours, strict=True) if own else [(expert, whole)] * config.num_experts
            rows = [flops / training_flops(1.0, one.training.batch_size, one.training.steps) for one, flops in costs]
            overhead += _drawing(config.router, inputs["partition"], rows)
    extra = overhead + sum(ours) - whole if ours else overhead
    steps = max(1, training.steps + round(extra / (whole / training.steps)))
    return replace(expert, training=replace(training, steps=steps))


def with_pretrained(expert: ExpertConfig, inputs: Inputs, role: str = "init") -> ExpertConfig:
    """The recipe with its checkpoint, if the stage was given one."""
    return replace(expert, init=str(inputs[role])) if role in inputs else expert


def by_cluster(folder: Path) -> list[Path]:
    """The clusters' folders below `folder`, in the order of their ids."""
    return sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: int(path.name))


def _drawing(router: RouterConfig, partition: Path, rows: Sequence[float]) -> float:
    """FLOPs of drawing for a router that sees no data, from those of one row through each expert."""
    sizes = sample_counts(proportional_counts(partition)[-1], router.samples_per_expert)
    return sum(expert_samples_flops(row, size, router.sample_steps) for row, size in zip(rows, sizes, strict=True))
