"""The stages that compress an ensemble, and measure how fast the result is."""

from pathlib import Path

from ddm_core.artifacts import Workspace
from ensemble.compression.config import CompressionConfig, TimingConfig
from ensemble.compression.measurement import time_both
from ensemble.compression.run import open_clusters, run_stage
from orchestrator.pipeline.stage_inputs import Inputs, cluster_folders


def run_compression(config: CompressionConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Compress the ensemble, each expert with the data of its own cluster."""
    clusters = cluster_folders(inputs["clusters"])
    held_out = cluster_folders(inputs["held_out"]) if "held_out" in inputs else []
    return run_stage(config, inputs["ensemble"], inputs["original"], clusters, out, workspace, held_out)


def run_timing(config: TimingConfig, inputs: Inputs, out: Path, workspace: Workspace) -> float:
    """Measure the CPU time per image of the compressed and the original ensemble."""
    compressed, original = inputs["ensemble"], inputs["original"]
    data = open_clusters(cluster_folders(inputs["clusters"]), original, labeled=config.labelled)
    return time_both(config, compressed, original, data, out, workspace)
