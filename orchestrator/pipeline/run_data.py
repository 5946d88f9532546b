"""The stages of the data: data set, features, partition.

Each function has the signature `(config, inputs, out, workspace) -> FLOPs` and calls one function of the package that
does the work, as in the other `run_…` files of this folder. Only workers import them, and only those of their stages.
"""

from pathlib import Path

from data_partition.config import DataConfig, PartitionConfig
from data_partition.datasets.build import build_dataset
from data_partition.features.extract import extract_features
from data_partition.partition import make_partition
from ddm_core.artifacts import Workspace
from experts.training.encode import divide_latents
from orchestrator.pipeline.stage_configs import NothingConfig
from orchestrator.pipeline.stage_inputs import Inputs, cluster_folders


def run_dataset(config: DataConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Resize the images and write them as shards."""
    build_dataset(config, out, workspace)
    return 0.0


def run_features(config: PartitionConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Compute the features that are clustered."""
    return extract_features(config, inputs["dataset"], out, workspace).flops


def run_partition(config: PartitionConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Divide the data set into clusters, and its latents with it."""
    flops = make_partition(config, inputs["dataset"], inputs["features"], out, workspace).flops
    divide_latents(inputs["latents"] / "train", cluster_folders(out / "clusters"), out / "latents")
    divide_latents(inputs["latents"] / "holdout", cluster_folders(out / "holdout"), out / "holdout_latents")
    return flops


def run_nothing(config: NothingConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Do nothing, so that a benchmark measures the orchestrator alone."""
    return 0.0
