"""The stages of the data: data set, features, partition.

Each function has the signature `(config, inputs, out, workspace) -> FLOPs` and calls one function of the package that
does the work, as in the other `run_…` files of this folder. Only workers import them, and only those of their stages.
"""

from pathlib import Path

from data_partition.config import DataConfig, PartitionConfig
from data_partition.datasets.build import build_dataset
from data_partition.delivery import Delivery, add_delivery
from data_partition.features.extract import extract_features
from data_partition.partition import make_partition
from data_partition.shards.shards import read_index
from ddm_core.artifacts import Workspace
from experts.training.latents.divide import divide_latents
from experts.training.latents.folder import join_latents
from orchestrator.pipeline.stage_configs import NothingConfig
from orchestrator.pipeline.stage_inputs import Inputs, cluster_folders


def run_dataset(config: DataConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Resize the images and write them as shards; a delivery has the classes of the data before it."""
    known = read_index(inputs["earlier"] / "train").class_names if "earlier" in inputs else None
    build_dataset(config, out, workspace, known)
    return 0.0


def run_features(config: PartitionConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Compute the features that are clustered."""
    return extract_features(config, inputs["dataset"], out, workspace).flops


def run_partition(config: PartitionConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Divide the data set into clusters, and its latents with it; a delivery is added to the clusters before it."""
    if "earlier" in inputs:
        return _extend_partition(config, inputs, out, workspace)
    flops = make_partition(config, inputs["dataset"], inputs["features"], out, workspace).flops
    divide_latents(inputs["latents"] / "train", cluster_folders(out / "clusters"), out / "latents")
    divide_latents(inputs["latents"] / "holdout", cluster_folders(out / "holdout"), out / "holdout_latents")
    return flops


def _extend_partition(config: PartitionConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    earlier, dataset = inputs["earlier"], inputs["dataset"]
    delivery = Delivery(config=config, earlier=earlier, dataset=dataset, workspace=workspace)
    flops = add_delivery(delivery, out).flops
    for part, name in (("train", "latents"), ("holdout", "holdout_latents")):
        clusters = cluster_folders(delivery.clusters(part))
        divide_latents(inputs["latents"] / part, clusters, workspace.scratch / name)
        for k in range(len(clusters)):
            join_latents([earlier / name / str(k), workspace.scratch / name / str(k)], out / name / str(k))
    return flops


def run_nothing(config: NothingConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Do nothing, so that a benchmark measures the orchestrator alone."""
    return 0.0
