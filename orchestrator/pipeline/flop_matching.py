"""FLOP matching: how many steps a baseline trains, so that it costs as many FLOPs as the training of our side."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ddm_core.artifacts import read_manifest
from ensemble.sampling.expert_samples import expert_samples_flops, proportional_counts, sample_counts
from experts.codecs.registry import load_codec
from experts.config import ExpertConfig
from experts.expert import expert_flops
from experts.training.flops import training_flops
from experts.training.latents.folder import read_class_names, read_latents
from orchestrator.pipeline.stage_configs import MonolithStageConfig
from orchestrator.pipeline.stage_inputs import Inputs, cluster_folders, with_init_checkpoint
from router.config import RouterConfig
from router.train import router_flops


def flop_matched_config(config: MonolithStageConfig, inputs: Inputs) -> ExpertConfig:
    """Return the monolith's configuration with extra steps for router, clustering and larger experts."""
    latent_shape = load_codec(inputs["codec"]).latent_shape
    latents = cluster_folders(inputs["partition"] / "latents")[0]
    num_classes, null_text = len(read_class_names(latents)), read_latents(latents).null_text
    monolith, training = with_init_checkpoint(config.expert, inputs), config.expert.training
    monolith_flops = expert_flops(monolith, latent_shape, num_classes, null_text)
    experts = [with_init_checkpoint(expert, inputs, f"init_{k}") for k, expert in enumerate(config.experts)]
    flops_of_experts = [expert_flops(expert, latent_shape, num_classes, null_text) for expert in experts]
    extra = read_manifest(inputs["features"]).flops + read_manifest(inputs["partition"]).flops
    if config.router is not None:
        samples = int(proportional_counts(inputs["partition"])[-1].sum())
        extra += router_flops(config.router, latent_shape, num_classes, config.num_experts, null_text, samples)
        if config.router.data == "samples":
            costs = (
                list(zip(experts, flops_of_experts, strict=True)) or [(monolith, monolith_flops)] * config.num_experts
            )
            row_flops = [
                flops / training_flops(1.0, expert.training.batch_size, expert.training.steps)
                for expert, flops in costs
            ]
            extra += _sampling_flops(config.router, inputs["partition"], row_flops)
    if experts:
        extra = extra + sum(flops_of_experts) - monolith_flops
    steps = max(1, training.steps + round(extra / (monolith_flops / training.steps)))
    return replace(monolith, training=replace(training, steps=steps))


def _sampling_flops(router: RouterConfig, partition: Path, row_flops: Sequence[float]) -> float:
    """Return the FLOPs of the samples that train a router without data; `row_flops` is one row through each expert."""
    counts = sample_counts(proportional_counts(partition)[-1], router.samples_per_expert)
    return sum(
        expert_samples_flops(row, count, router.sample_steps) for row, count in zip(row_flops, counts, strict=True)
    )
