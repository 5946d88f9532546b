"""Load an expert of any kind from its folder.

To add a kind of expert, derive it from `ExpertModel` and add the file that marks its folder to `EXPERT_KINDS`.
"""

from collections.abc import Callable
from pathlib import Path

from ensemble.multi_network_experts import TRUNCATED, TruncatedExpert
from experts.baselines.cluster_conditioned import (
    ClusterConditionedExpert,
    is_cluster_conditioned,
)
from experts.expert import Expert
from experts.expert_model import ExpertModel
from experts.time_split import TIME_SPLIT, TimeSplitExpert

EXPERT_KINDS: dict[str, Callable[[Path], ExpertModel]] = {
    TIME_SPLIT: TimeSplitExpert.load,
    TRUNCATED: TruncatedExpert.load,
}
"""Loaders by the file that marks an expert's folder; a folder with none of these files holds an `Expert`."""


def load_expert(folder: Path) -> ExpertModel:
    """Load one expert; raises an `ArtifactError` if a file is missing or broken."""
    load = next((load for file, load in EXPERT_KINDS.items() if (folder / file).is_file()), Expert.load)
    return load(folder)


def load_single_network(folder: Path) -> Expert | ClusterConditionedExpert:
    """Load a trained expert, the first network of one that divides t, or a cluster-conditioned one for cluster 0.

    Raises an `ArtifactError` for other folders of several networks.
    """
    if (folder / TIME_SPLIT).is_file():
        return Expert.load(folder / "0")
    return ClusterConditionedExpert.load_all(folder)[0] if is_cluster_conditioned(folder) else Expert.load(folder)
