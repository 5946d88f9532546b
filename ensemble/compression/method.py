"""The interface of a compression method: its inputs, its result and its error."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddm_core.artifacts import Workspace
from ddm_core.errors import DDMError
from ensemble.config import SamplingConfig
from ensemble.pipeline import EnsemblePipeline
from experts.codecs.registry import load_codec
from experts.expert import Expert
from experts.expert_model import ExpertModel
from experts.training.latent_dataset import LatentDataset
from experts.training.latents.training_set import encode_latents


class StageError(DDMError, ValueError):
    """A compression stage cannot work on this ensemble."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertResult:
    """A compressed expert, and the cost of computing it."""

    expert: ExpertModel
    modules: int
    """Number of changed weights, layers or units, whatever the method works on; 0 is an error of the stage."""
    flops: float
    """FLOPs of calibration, search and training."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Measurements to write as JSON."""

    @property
    def network(self) -> Expert:
        """Return the expert if it is a single network; raise `TypeError` otherwise."""
        if not isinstance(self.expert, Expert):
            raise TypeError(f"a {type(self.expert).__name__} is not a single network")
        return self.expert


Method = Callable[[Expert, LatentDataset, Any, Workspace], ExpertResult]
"""(expert, latents of its own cluster, configuration, this expert's workspace) to a compressed expert.

The input expert is not changed. Raises `StageError` if nothing would change, `Preempted` between two steps.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clusters:
    """Access to the latents of each cluster."""

    folders: Sequence[Path]
    codec: Path
    labeled: bool
    held_out: Sequence[Path] = ()
    """Folders of the held-out latents of each cluster."""
    reads_text: bool = False
    """Whether the experts were trained on captions."""
    is_single_network: bool = False
    """True if one network replaces all experts, so that its data are all clusters."""

    def load_latents(self, k: int, workspace: Workspace) -> LatentDataset:
        """Return the latents of the cluster of expert `k`."""
        return self._encode(self.folders if self.is_single_network else [self.folders[k]], workspace)

    def load_held_out(self, k: int, workspace: Workspace) -> LatentDataset:
        """Return the held-out latents of the cluster of expert `k`; raise `StageError` if there are fewer than two."""
        folders = self.held_out if self.is_single_network else self.held_out[k : k + 1]
        latents = self._encode(folders, workspace) if folders else None
        if latents is None or len(latents) < 2:
            raise StageError(f"this stage is scored on held-out images, and cluster {k} has too few; hold out more")
        return latents

    def load_all_latents(self, workspace: Workspace) -> LatentDataset:
        """Return the latents of all clusters."""
        return self._encode(self.folders, workspace)

    def _encode(self, folders: Sequence[Path], workspace: Workspace) -> LatentDataset:
        latents = encode_latents(folders, load_codec(self.codec), self.codec, workspace)
        if not self.labeled:
            return latents.without_conditions()
        if self.reads_text and latents.captions is None:
            raise StageError(
                "this stage works on the conditions that the experts were trained on, and these latents have no "
                "captions; give it the run's encoded captions, or leave the stage out"
            )
        return latents


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionContext:
    """Inputs of a method that works on all experts at once."""

    ensemble: Path
    original: Path
    """The ensemble before the first compression stage."""
    data: Clusters
    sampling: SamplingConfig
    workspace: Workspace

    def load_experts(self, *, original: bool = False) -> Mapping[int, ExpertModel]:
        """Load the experts, by their ids; `original` loads those of the uncompressed ensemble."""
        return EnsemblePipeline.from_pretrained(self.original if original else self.ensemble).ensemble.experts

    def load_single_networks(self, method: str) -> dict[int, Expert]:
        """Load the experts of the ensemble, by their ids; raise `StageError` if one is not a single network."""
        experts = {}
        for k, expert in self.load_experts().items():
            if not isinstance(expert, Expert):
                raise StageError(
                    f"{method} needs experts of one network each, and expert {k} is a {type(expert).__name__}; remove "
                    "the stage before it, or this one"
                )
            experts[k] = expert
        return experts

    def load_latents(self, ids: Sequence[int], *, held_out: bool = False) -> dict[int, LatentDataset]:
        """Return the latents of the clusters of these experts, or those held out of them."""
        load = self.data.load_held_out if held_out else self.data.load_latents
        return {k: load(k, self.workspace.part(f"{'held_out' if held_out else 'cluster'}_{k}")) for k in ids}

    def check_noise_schedules(self, method: str) -> None:
        """Raise `StageError` if the noise schedule of an expert differs from that of the ensemble."""
        ensemble = EnsemblePipeline.from_pretrained(self.ensemble).ensemble
        for k, expert in ensemble.experts.items():
            if isinstance(expert, Expert) and expert.noise_schedule.name != ensemble.noise_schedule.name:
                raise StageError(
                    f"{method} uses the ensemble's noise schedule, {ensemble.noise_schedule.name}, and expert {k} has "
                    f"{expert.noise_schedule.name}; remove this expert, or train it with the ensemble's schedule"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleResult:
    """The compressed experts, and the cost of computing them."""

    experts: Mapping[int, ExpertModel]
    modules: int
    """Number of changed weights, over all experts; 0 is an error of the stage."""
    flops: float
    """FLOPs of calibration and search."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Measurements to write as JSON."""
    keeps_router: bool = True
    """False if one network replaces all experts."""
    notes: tuple[str, ...] = ()
    """Lines for the terminal: what was tried, and what was chosen."""


EnsembleMethod = Callable[[Any, CompressionContext], EnsembleResult]
"""(configuration, context) to the compressed experts."""
