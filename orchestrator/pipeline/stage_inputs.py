"""What a stage finds among its inputs: the folders of artifacts that it may read, by role."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from experts.config import ExpertConfig
from orchestrator.pipeline.stage import expert_id

Inputs = Mapping[str, Path]


def cluster_folders(folder: Path) -> list[Path]:
    """Return the clusters' folders inside `folder`, ordered by cluster id."""
    return sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda path: int(path.name))


def experts_by_id(inputs: Inputs) -> dict[int, Path]:
    """Return the folders of the trained experts among a stage's inputs, whose roles are `expert_<k>`."""
    return {k: path for role, path in inputs.items() if (k := expert_id(role)) is not None}


def with_init_checkpoint(expert: ExpertConfig, inputs: Inputs, role: str = "init") -> ExpertConfig:
    """Return the configuration with the path of its checkpoint, if that is among the inputs."""
    return replace(expert, init=str(inputs[role])) if role in inputs else expert
