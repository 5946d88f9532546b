"""Which function runs a kind of stage: the table between the graph and the rooms below.

To add a stage, write a function `(config, inputs, out, workspace) -> FLOPs` in the room that it belongs to, add a row
here and a node in `graph.py`. This file imports every room, so only workers import it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from artifacts import Workspace, read_manifest
from data_partition.config import DataConfig, PartitionConfig
from data_partition.dataset import build_dataset
from data_partition.features import extract_features
from data_partition.partition import make_partition
from data_partition.shards import read_index
from ensemble.config import EvaluationConfig
from ensemble.evaluate import evaluate
from ensemble.pipeline import assemble
from ensemble.references import build_reference
from experts.codecs import fit_codec, load_codec
from experts.config import CodecConfig
from experts.expert import expert_flops, train_expert
from orchestrator.graph import (
    AssemblyStageConfig,
    ExpertStageConfig,
    MonolithStageConfig,
    NothingConfig,
    ScoreStageConfig,
)
from router.config import RouterConfig
from router.train import router_flops, train_router

Inputs = Mapping[str, Path]


@dataclass(frozen=True, slots=True)
class Kind:
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
    shards = [inputs["shards"]]
    return train_expert(config.expert, shards, inputs["codec"], out, workspace, cluster_id=config.cluster_id).flops


def run_router(config: RouterConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Train the router on the shards of all clusters."""
    clusters, holdouts = by_cluster(inputs["clusters"]), by_cluster(inputs["holdouts"])
    return train_router(config, clusters, inputs["codec"], holdouts, out, workspace).flops


def run_monolith(config: MonolithStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Train the baseline on all clusters, with extra steps worth the router's and the clustering's FLOPs."""
    clusters = by_cluster(inputs["partition"] / "clusters")
    latent_shape = load_codec(inputs["codec"]).latent_shape
    num_classes = len(read_index(clusters[0]).class_names)
    training = config.expert.training
    overhead = read_manifest(inputs["features"]).flops + read_manifest(inputs["partition"]).flops
    if config.router is not None:
        overhead += router_flops(config.router, latent_shape, num_classes, config.num_experts)
    one_step = expert_flops(config.expert, latent_shape, num_classes) / training.steps
    steps = training.steps + round(overhead / one_step)
    expert = replace(config.expert, training=replace(training, steps=steps))
    return train_expert(expert, clusters, inputs["codec"], out, workspace, cluster_id=0).flops


def run_ensemble(config: AssemblyStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Put trained experts and the router into one pipeline folder."""
    experts = {k: inputs[f"expert_{k}"] for k in config.expert_ids if f"expert_{k}" in inputs}
    missing = [k for k in config.expert_ids if k not in experts]
    class_names = read_index(inputs["shards"]).class_names
    assemble(experts, inputs.get("router"), inputs["codec"], out, missing, class_names)
    return 0.0


def run_reference(config: EvaluationConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Compute once what every score compares with."""
    return build_reference(inputs["dataset"], config, out, workspace).flops


def run_score(config: ScoreStageConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Sample the ensemble and score the samples."""
    folders = (inputs["ensemble"], inputs["reference"], inputs["partition"])
    return evaluate(*folders, config.evaluation, config.sampling, out, workspace).flops


def run_nothing(config: NothingConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """No work: what is left is what the orchestrator itself costs."""
    return 0.0


def by_cluster(folder: Path) -> list[Path]:
    """The clusters' folders below `folder`, in the order of their ids."""
    return sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: int(path.name))


KINDS: dict[str, Kind] = {
    "dataset": Kind(DataConfig, run_dataset),
    "codec": Kind(CodecConfig, run_codec),
    "features": Kind(PartitionConfig, run_features),
    "partition": Kind(PartitionConfig, run_partition),
    "expert": Kind(ExpertStageConfig, run_expert),
    "router": Kind(RouterConfig, run_router),
    "monolith": Kind(MonolithStageConfig, run_monolith),
    "ensemble": Kind(AssemblyStageConfig, run_ensemble),
    "reference": Kind(EvaluationConfig, run_reference),
    "score": Kind(ScoreStageConfig, run_score),
    "nothing": Kind(NothingConfig, run_nothing),
}
