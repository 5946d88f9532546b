"""Which function runs a kind of stage: the table between the graph and the rooms below.

To add a stage, write a function `(config, inputs, out, workspace) -> FLOPs` in the room that it belongs to, add a row
here and a node in `graph.py`. This file imports every room, so only workers import it.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from orchestrator.pipeline.flop_matching import by_cluster, flop_matched_config, with_pretrained
from orchestrator.pipeline.graph import (
    EnsembleStageConfig,
    ExpertStageConfig,
    MonolithStageConfig,
    NothingConfig,
    ScoreStageConfig,
    SelectionSearchStageConfig,
)
from orchestrator.pipeline.stage_configs import DistilledMonolithStageConfig, InitStageConfig
from router.config import RouterConfig
from router.train import train_router

Inputs = Mapping[str, Path]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StageKind:
    """A kind of stage: the type of its configuration, and the function that returns the FLOPs it took."""

    config: type[Any]
    run: Callable[[Any, Inputs, Path, Workspace], float]


def run_dataset(config: DataConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Bring the images to one size and write them as shards."""
    build_dataset(config, out, workspace)
    return 0.0


def run_codec(config: CodecConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Fit what a sample is to a network."""
    return fit_codec(config, inputs["shards"], out, workspace)


def run_features(config: PartitionConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Compute the features in which clusters are found."""
    return extract_features(config, inputs["dataset"], out, workspace).flops


def run_partition(config: PartitionConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Divide the data set into clusters."""
    return make_partition(config, inputs["dataset"], inputs["features"], out, workspace).flops


def run_expert(config: ExpertStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Train one expert on its own shards."""
    shards, expert = [inputs["shards"]], with_pretrained(config.expert, inputs)
    return train_expert(expert, shards, inputs["codec"], out, workspace, cluster_id=config.cluster_id).flops


def run_router(config: RouterConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Train the router on the shards of all clusters, or on latents that the experts drew."""
    clusters = by_cluster(inputs["clusters"]) if "clusters" in inputs else []
    holdouts, draws = by_cluster(inputs["holdouts"]), inputs.get("expert_samples")
    return train_router(config, clusters, inputs["codec"], holdouts, out, workspace, draws=draws).flops


def run_init(config: InitStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Copy a checkpoint to start from into the run, if it is what it was when the run was composed."""
    folder = Path(config.folder)
    check_unchanged(ExpertConfig(init=config.folder, init_checksum=config.checksum))
    for file in init_files(folder):
        copy = out / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    return 0.0


def run_expert_samples(config: ExpertSamplesConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Draw latents from the experts, for a router that sees no data."""
    return sample_expert_latents(numbered(inputs), inputs["partition"], config, out, workspace)


def run_monolith(config: MonolithStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Train the baseline on all clusters, with extra steps worth the router's and the clustering's FLOPs."""
    clusters = by_cluster(inputs["partition"] / "clusters")
    return train_expert(
        flop_matched_config(config, inputs), clusters, inputs["codec"], out, workspace, cluster_id=0
    ).flops


def run_cluster_conditioned(config: MonolithStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Train the baseline that is told the cluster, for as many FLOPs as the monolith."""
    clusters = by_cluster(inputs["partition"] / "clusters")
    return train_cluster_conditioned(
        flop_matched_config(config, inputs), clusters, inputs["codec"], out, workspace
    ).flops


def run_distilled_monolith(
    config: DistilledMonolithStageConfig, inputs: Inputs, out: Path, workspace: Workspace
) -> float:
    """Distil the experts into one network; the FLOPs are its own and the teachers' calls."""
    if config.from_expert is not None and "init" not in inputs:
        log.warning("expert %d is missing, so the student starts from scratch", config.from_expert)
    clusters, expert = by_cluster(inputs["partition"] / "clusters"), with_pretrained(config.expert, inputs)
    return train_distilled_monolith(expert, numbered(inputs), clusters, inputs["codec"], out, workspace).flops


def run_ensemble(config: EnsembleStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Put trained experts and the router into one pipeline folder."""
    experts = (
        dict.fromkeys(config.expert_ids, inputs["cluster_conditioned"])
        if "cluster_conditioned" in inputs
        else numbered(inputs)
    )
    missing = [k for k in config.expert_ids if k not in experts]
    class_names = read_index(inputs["shards"]).class_names
    assemble(experts, inputs.get("router"), inputs["codec"], out, missing, class_names)
    return 0.0


def run_reference(config: EvaluationConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Compute once what every score compares with."""
    return build_reference(inputs["dataset"], config, out, workspace).flops


def run_score(config: ScoreStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Sample the ensemble, by the selection that was chosen if one was, and score the samples."""
    folders, sampling = (inputs["ensemble"], inputs["reference"], inputs["partition"]), config.sampling
    if "selection_search" in inputs:
        sampling = replace(sampling, selection=read_choice(inputs["selection_search"]).selection)
    return evaluate(*folders, config.evaluation, sampling, out, workspace).flops


def run_compression(config: CompressionConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Make the ensemble smaller, each expert with its own cluster at hand."""
    return run_stage(config, inputs["ensemble"], inputs["whole"], by_cluster(inputs["clusters"]), out, workspace)


def run_timing(config: TimingConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Measure the processor time of an image."""
    return time_both(config, inputs["ensemble"], inputs["whole"], out, workspace)


def run_selection_search(config: SelectionSearchStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Try selections and choose one."""
    folders = (inputs["ensemble"], inputs["reference"])
    return search_selection(*folders, config.choice, config.evaluation, config.sampling, out, workspace)


def run_nothing(config: NothingConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """No work: what is left is what the orchestrator itself costs."""
    return 0.0


def numbered(inputs: Inputs) -> dict[int, Path]:
    """The experts among the inputs, by their ids."""
    roles = [role for role in inputs if role.startswith("expert_")]
    return {int(role.removeprefix("expert_")): inputs[role] for role in roles}


STAGE_KINDS: dict[str, StageKind] = {
    "dataset": StageKind(DataConfig, run_dataset),
    "codec": StageKind(CodecConfig, run_codec),
    "features": StageKind(PartitionConfig, run_features),
    "partition": StageKind(PartitionConfig, run_partition),
    "expert": StageKind(ExpertStageConfig, run_expert),
    "init": StageKind(InitStageConfig, run_init),
    "expert_samples": StageKind(ExpertSamplesConfig, run_expert_samples),
    "router": StageKind(RouterConfig, run_router),
    "monolith": StageKind(MonolithStageConfig, run_monolith),
    "cluster_conditioned": StageKind(MonolithStageConfig, run_cluster_conditioned),
    "distilled_monolith": StageKind(DistilledMonolithStageConfig, run_distilled_monolith),
    "ensemble": StageKind(EnsembleStageConfig, run_ensemble),
    "reference": StageKind(EvaluationConfig, run_reference),
    "selection_search": StageKind(SelectionSearchStageConfig, run_selection_search),
    "distill": StageKind(CompressionConfig, run_compression),
    "accelerate": StageKind(CompressionConfig, run_compression),
    "prune": StageKind(CompressionConfig, run_compression),
    "quantize": StageKind(CompressionConfig, run_compression),
    "stitch": StageKind(CompressionConfig, run_compression),
    "timing": StageKind(TimingConfig, run_timing),
    "score": StageKind(ScoreStageConfig, run_score),
    "nothing": StageKind(NothingConfig, run_nothing),
}
