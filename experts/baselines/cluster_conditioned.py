"""Cluster-conditioned baseline, the strongest fair one: one network for all clusters that receives the cluster id.

Its condition is the pair (class, cluster). The null class is one of the classes, so the class can be dropped and the
cluster never is. It is sampled like sticky experts: k ~ p(k | class) is drawn once and stays fixed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ddm_core.artifacts import CorruptArtifact, Workspace, read_json, write_json
from experts.codecs.registry import load_codec
from experts.conditions.condition import Condition
from experts.config import ExpertConfig
from experts.diffusion.loss_weights import build_loss_weight
from experts.diffusion.noise_schedule import NoiseSchedule
from experts.expert import Expert, ExpertSummary, train_network
from experts.expert_model import ExpertModel
from experts.networks.pretrained import build_initial_model
from experts.training.held_out import TrainingData
from experts.training.latent_dataset import Batch
from experts.training.latents.folder import read_class_names
from experts.training.loss import expert_loss
from experts.types import Latents, Times

SETTINGS = "cluster_conditioned.json"
CLUSTER_CONDITIONED = "cluster_conditioned"
"""Folder of the shared network in a pipeline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConditionedExpert(ExpertModel):
    """The shared network conditional on one cluster; K of them replace K experts in an ensemble."""

    shared: Expert
    """Has (classes + 1) x clusters conditions."""
    cluster_id: int
    num_clusters: int

    @property
    def num_classes(self) -> int:
        """Return the number of classes of the data; 0 is unconditional."""
        return self.shared.num_classes // self.num_clusters - 1

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """Return the noise schedule that the network was trained on."""
        return self.shared.noise_schedule

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return the shape of one latent."""
        return self.shared.latent_shape

    def velocity(
        self, noised: Latents, t: Times, condition: Condition, noise_schedule: NoiseSchedule | None = None
    ) -> Latents:
        """Return the velocity on `noise_schedule` (default: the network's) for samples of this cluster."""
        clusters = torch.full_like(condition.class_id, self.cluster_id)
        pairs = with_cluster(condition, clusters, self.num_classes, self.num_clusters)
        return self.shared.velocity(noised, t, pairs, noise_schedule)

    def networks(self, *, with_cache: bool = True) -> Iterator[nn.Module]:
        """Yield the shared network."""
        yield from self.shared.networks(with_cache=with_cache)

    def folder_name(self, expert_id: int) -> str:
        """Return the folder that the experts of all clusters share."""
        return CLUSTER_CONDITIONED

    def to(self, device: torch.device | str) -> "ClusterConditionedExpert":
        """Move the shared network to a device, in place."""
        self.shared.to(device)
        return self

    def save(self, folder: Path) -> None:
        """Write the shared network and its number of clusters."""
        self.shared.save(folder)
        write_json(folder / SETTINGS, {"num_clusters": self.num_clusters})

    @classmethod
    def load_all(cls, folder: Path) -> Mapping[int, "ClusterConditionedExpert"]:
        """Load one expert for each cluster; raise an `ArtifactError` if a file is missing or invalid."""
        shared, settings = Expert.load(folder), read_json(folder / SETTINGS)
        clusters = settings.get("num_clusters") if isinstance(settings, dict) else None
        if not isinstance(clusters, int) or clusters < 1 or not shared.num_classes or shared.num_classes % clusters:
            raise CorruptArtifact(
                f"{folder / SETTINGS} has {clusters} clusters, which must divide the network's {shared.num_classes} "
                "pairs of a class and a cluster; train it again"
            )
        return {k: cls(shared=shared, cluster_id=k, num_clusters=clusters) for k in range(clusters)}


def is_cluster_conditioned(folder: Path) -> bool:
    """Return whether a folder holds a cluster-conditioned network."""
    return (folder / SETTINGS).is_file()


def with_cluster(
    condition: Condition, cluster_id: Int[Tensor, " batch"], num_classes: int, num_clusters: int
) -> Condition:
    """Return the pair (class, cluster) as one class; the pairs of the null class come last."""
    return replace(condition, class_id=condition.embedding_index(num_classes) * num_clusters + cluster_id)


def train_cluster_conditioned(
    config: ExpertConfig,
    clusters: Sequence[Path],
    codec: Path,
    out: Path,
    workspace: Workspace,
    held_out: Sequence[Path] = (),
) -> ExpertSummary:
    """Train the network on the samples of all clusters, each with its cluster id, and write it to `out`."""
    data = TrainingData.open(clusters, held_out, load_codec(codec), codec, workspace)
    dataset, unseen = data.samples, data.held_out
    num_classes, num_clusters = len(read_class_names(clusters[0])), len(clusters)
    data.check_classes(num_classes)
    if unseen is not None:
        pairs = with_cluster(Condition(unseen.class_id), unseen.cluster_id, num_classes, num_clusters)
        data = replace(data, held_out=replace(unseen, class_id=pairs.class_id))
    num_pairs = (num_classes + 1) * num_clusters
    initial_model = build_initial_model(config, dataset.latent_shape, num_pairs, dataset.null_text)

    def loss(model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        pairs = with_cluster(batch.condition, batch.cluster_id, num_classes, num_clusters)
        conditioned = replace(batch, condition=pairs)
        return {
            "loss": expert_loss(
                model, conditioned, initial_model.prediction, initial_model.noise_schedule, build_loss_weight(config)
            )
        }

    summary = train_network(config.training, data, initial_model, loss, out, workspace, num_pairs)
    write_json(out / SETTINGS, {"num_clusters": num_clusters})
    return summary
