"""One function per kind of stage: from a stage's configuration and inputs to the functions of the packages below.

Each has the signature `(config, inputs, out, workspace) -> FLOPs` and calls one function of the package that does the
work. This file imports every package, so only workers import it.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from data_partition.config import DataConfig, PartitionConfig
from data_partition.datasets.build import build_dataset
from data_partition.features.extract import extract_features
from data_partition.partition import make_partition
from data_partition.shards.shards import read_index
from ddm_core.artifacts import Workspace
from ensemble.compression.config import CompressionConfig, TimingConfig
from ensemble.compression.measurement import time_both
from ensemble.compression.run import run_stage
from ensemble.config import EvaluationConfig, ExpertSamplesConfig
from ensemble.evaluation.evaluate import evaluate
from ensemble.evaluation.reference import build_reference
from ensemble.evaluation.selection_search import read_choice, search_selection
from ensemble.pipeline import assemble
from ensemble.sampling.expert_samples import sample_expert_latents
from experts.baselines.cluster_conditioned import train_cluster_conditioned
from experts.baselines.distilled_monolith import train_distilled_monolith
from experts.codecs.registry import fit_codec
from experts.config import CodecConfig, ExpertConfig
from experts.expert import train_expert
from experts.networks.pretrained_files import check_unchanged, init_files
from orchestrator.pipeline.flop_matching import cluster_folders, flop_matched_config, with_init_checkpoint
from orchestrator.pipeline.stage_configs import (
    DistilledMonolithStageConfig,
    EnsembleStageConfig,
    ExpertStageConfig,
    InitStageConfig,
    MonolithStageConfig,
    NothingConfig,
    ScoreStageConfig,
    SelectionSearchStageConfig,
)
from router.config import RouterConfig
from router.train import train_router

Inputs = Mapping[str, Path]

log = logging.getLogger(__name__)


def run_dataset(config: DataConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Resize the images and write them as shards."""
    build_dataset(config, out, workspace)
    return 0.0


def run_codec(config: CodecConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Fit the codec that maps images to latents."""
    return fit_codec(config, inputs["shards"], out, workspace)


def run_features(config: PartitionConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Compute the features that are clustered."""
    return extract_features(config, inputs["dataset"], out, workspace).flops


def run_partition(config: PartitionConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Divide the data set into clusters."""
    return make_partition(config, inputs["dataset"], inputs["features"], out, workspace).flops


def run_expert(config: ExpertStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Train one expert on the shards of its cluster."""
    shards, expert = [inputs["shards"]], with_init_checkpoint(config.expert, inputs)
    return train_expert(expert, shards, inputs["codec"], out, workspace, cluster_id=config.cluster_id).flops


def run_router(config: RouterConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Train the router on the shards of all clusters, or on latents that the experts generated."""
    clusters = cluster_folders(inputs["clusters"]) if "clusters" in inputs else []
    holdouts, samples = cluster_folders(inputs["holdouts"]), inputs.get("expert_samples")
    return train_router(config, clusters, inputs["codec"], holdouts, out, workspace, expert_samples=samples).flops


def run_init(config: InitStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Copy a pretrained checkpoint into the run; raises if it changed after the run was composed."""
    folder = Path(config.folder)
    check_unchanged(ExpertConfig(init=config.folder, init_checksum=config.checksum))
    for file in init_files(folder):
        target = out / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return 0.0


def run_expert_samples(config: ExpertSamplesConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Generate latents with the experts, for a router that trains without data."""
    return sample_expert_latents(_experts_by_id(inputs), inputs["partition"], config, out, workspace)


def run_monolith(config: MonolithStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Train the monolith on all clusters, with extra steps for the router's and the clustering's FLOPs."""
    clusters = cluster_folders(inputs["partition"] / "clusters")
    return train_expert(
        flop_matched_config(config, inputs), clusters, inputs["codec"], out, workspace, cluster_id=0
    ).flops


def run_cluster_conditioned(config: MonolithStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Train the cluster-conditioned monolith with as many FLOPs as the monolith."""
    clusters = cluster_folders(inputs["partition"] / "clusters")
    return train_cluster_conditioned(
        flop_matched_config(config, inputs), clusters, inputs["codec"], out, workspace
    ).flops


def run_distilled_monolith(
    config: DistilledMonolithStageConfig, inputs: Inputs, out: Path, workspace: Workspace
) -> float:
    """Distill the experts into one network; its FLOPs include the teachers' calls."""
    if config.from_expert is not None and "init" not in inputs:
        log.warning("expert %d is missing; the student starts from random weights", config.from_expert)
    clusters, expert = cluster_folders(inputs["partition"] / "clusters"), with_init_checkpoint(config.expert, inputs)
    return train_distilled_monolith(expert, _experts_by_id(inputs), clusters, inputs["codec"], out, workspace).flops


def run_ensemble(config: EnsembleStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Assemble trained experts and the router into one pipeline folder."""
    experts = (
        dict.fromkeys(config.expert_ids, inputs["cluster_conditioned"])
        if "cluster_conditioned" in inputs
        else _experts_by_id(inputs)
    )
    missing = [k for k in config.expert_ids if k not in experts]
    class_names = read_index(inputs["shards"]).class_names
    assemble(experts, inputs.get("router"), inputs["codec"], out, missing, class_names)
    return 0.0


def run_reference(config: EvaluationConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Compute the reference statistics that all scores share."""
    return build_reference(inputs["dataset"], config, out, workspace).flops


def run_score(config: ScoreStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Sample the ensemble and score the samples; a selection search replaces the selection."""
    folders, sampling = (inputs["ensemble"], inputs["reference"], inputs["partition"]), config.sampling
    if "selection_search" in inputs:
        sampling = replace(sampling, selection=read_choice(inputs["selection_search"]).selection)
    return evaluate(*folders, config.evaluation, sampling, out, workspace).flops


def run_compression(config: CompressionConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Compress the ensemble, each expert with the data of its own cluster."""
    clusters = cluster_folders(inputs["clusters"])
    return run_stage(config, inputs["ensemble"], inputs["original"], clusters, out, workspace)


def run_timing(config: TimingConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Measure the CPU time per image of the compressed and the original ensemble."""
    return time_both(config, inputs["ensemble"], inputs["original"], out, workspace)


def run_selection_search(config: SelectionSearchStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Try the candidate selections and choose one."""
    folders = (inputs["ensemble"], inputs["reference"])
    return search_selection(*folders, config.search, config.evaluation, config.sampling, out, workspace)


def run_nothing(config: NothingConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Do nothing, so that a benchmark measures the orchestrator alone."""
    return 0.0


def _experts_by_id(inputs: Inputs) -> dict[int, Path]:
    roles = [role for role in inputs if role.startswith("expert_")]
    return {int(role.removeprefix("expert_")): inputs[role] for role in roles}
