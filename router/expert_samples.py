"""A folder of latents that the experts generated, for training a router without the data.

latents.json, clean.bin …     same format as encoded images in `experts.training.latents.folder`
prior_counts.json             the clusters' true counts by class, the only facts about the data
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ddm_core.artifacts import CorruptArtifact, read_json, write_json
from experts.training.latent_dataset import LatentDataset
from experts.training.latents.folder import LatentWriter, read_latents

PRIOR_COUNTS = "prior_counts.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSamples:
    """Latents of all experts, and the true sizes of their clusters."""

    dataset: LatentDataset
    prior_counts: Float[Tensor, "condition expert"]
    """Same layout as `Router.prior_counts`."""

    def save(self, folder: Path) -> None:
        """Write the folder."""
        with LatentWriter(folder) as writer:
            writer.add(self.dataset)
        write_json(folder / PRIOR_COUNTS, self.prior_counts.tolist())

    @classmethod
    def load(cls, folder: Path) -> "ExpertSamples":
        """Read what `save` wrote; raises an `ArtifactError` if its files are inconsistent."""
        dataset, counts = read_latents(folder), torch.tensor(read_json(folder / PRIOR_COUNTS), dtype=torch.float64)
        if counts.ndim != 2 or dataset.cluster_id.amax() >= counts.shape[1]:
            raise CorruptArtifact(
                f"{folder / PRIOR_COUNTS} has shape {tuple(counts.shape)}, but there are samples of "
                f"expert {int(dataset.cluster_id.amax())}; generate them again"
            )
        return cls(dataset=dataset, prior_counts=counts)
