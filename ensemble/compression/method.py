"""What a stage that looks at all experts at once is given, and what it has made of them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddm_core.artifacts import Workspace
from ensemble.config import SamplingConfig
from ensemble.ensemble import ExpertModel
from ensemble.pipeline import DDMPipeline
from experts.codecs.registry import load_codec
from experts.expert import Expert
from experts.training.latent_dataset import LatentDataset, encode_latents


class StageError(ValueError):
    """A stage cannot do what it was asked to do with this ensemble."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertResult:
    """A smaller expert, and what making it took."""

    expert: ExpertModel
    modules: int
    """Weights, layers or whatever the method works on, that it has changed; 0 is an error of the stage."""
    flops: float
    """Of calibrating, searching and training again."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What is worth looking at later, as JSON."""

    @property
    def network(self) -> Expert:
        """The expert, if it is one network; `TypeError` if it is not."""
        if not isinstance(self.expert, Expert):
            raise TypeError(f"a {type(self.expert).__name__} is not one network")
        return self.expert


Method = Callable[[Expert, LatentDataset, Any, Workspace], ExpertResult]
"""(expert, latents of its own cluster, configuration, this expert's workspace) to a smaller one.

The expert that is given is not changed. Raises `StageError` if nothing would change, `Preempted` between two steps.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clusters:
    """Where the experts' own data are."""

    folders: Sequence[Path]
    codec: Path
    labelled: bool
    is_one: bool = False
    """Whether a single network stands for all of them."""

    def latents(self, k: int, workspace: Workspace) -> LatentDataset:
        """Those of one expert's cluster."""
        return self._encoded(self.folders if self.is_one else [self.folders[k]], workspace)

    def all_latents(self, workspace: Workspace) -> LatentDataset:
        """Those of all clusters."""
        return self._encoded(self.folders, workspace)

    def _encoded(self, folders: Sequence[Path], workspace: Workspace) -> LatentDataset:
        found = encode_latents(folders, load_codec(self.codec), self.codec, workspace)
        return found if self.labelled else found.unlabelled()


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionContext:
    """Everything that such a stage may look at."""

    ensemble: Path
    original: Path
    """The ensemble that nothing was done to."""
    data: Clusters
    sampling: SamplingConfig
    workspace: Workspace

    def ensembles(self, *, whole: bool = False) -> Mapping[int, ExpertModel]:
        """The experts by their ids, whatever they are."""
        return DDMPipeline.from_pretrained(self.original if whole else self.ensemble).ensemble.experts

    def experts(self, name: str) -> dict[int, Expert]:
        """Those of the ensemble; `StageError` if one is not a network of its own."""
        found = {}
        for k, expert in self.ensembles().items():
            if not isinstance(expert, Expert):
                raise StageError(f"{name} works on experts of their own, and expert {k} is a {type(expert).__name__}")
            found[k] = expert
        return found

    def latents(self, ids: Sequence[int]) -> dict[int, LatentDataset]:
        """The latents of their clusters."""
        return {k: self.data.latents(k, self.workspace.part(f"cluster_{k}")) for k in ids}

    def check_noise_schedules(self, name: str) -> None:
        """Raise `StageError` for an expert of another noise path: courses are gone through on the ensemble's own."""
        ensemble = DDMPipeline.from_pretrained(self.ensemble).ensemble
        for k, expert in ensemble.experts.items():
            if isinstance(expert, Expert) and expert.noise_schedule.name != ensemble.noise_schedule.name:
                raise StageError(
                    f"{name} works on the ensemble's noise path, {ensemble.noise_schedule.name}, and expert {k} is on "
                    f"{expert.noise_schedule.name}; leave it out, or train it on that path"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsembleResult:
    """The smaller experts, and what making them took."""

    experts: Mapping[int, ExpertModel]
    modules: int
    """Weights that were changed, over all experts; 0 is an error of the stage."""
    flops: float
    """Of calibrating and searching."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What is worth looking at later, as JSON."""
    keeps_router: bool = True
    """False if one network stands for all experts."""


EnsembleMethod = Callable[[Any, CompressionContext], EnsembleResult]
"""(configuration, what it is given) to the experts."""
