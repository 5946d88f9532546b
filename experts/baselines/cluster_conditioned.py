"""The strongest fair baseline: one network for all clusters that is told which cluster a sample is from.

Its condition is the pair (class, cluster); the null class is a class of its own, so that the class can be left out and
the cluster never is. It is sampled like sticky experts: k ~ p(k | class) once, and told to the end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from data_partition.shards.shards import read_index
from ddm_core.artifacts import CorruptArtifact, Workspace, read_json, write_json
from experts.codecs.registry import load_codec
from experts.condition import Condition
from experts.config import ExpertConfig
from experts.diffusion.noise_schedule import Latents, NoiseSchedule, Times
from experts.expert import Expert, ExpertSummary, check_classes, train_network
from experts.networks.pretrained import build_initial_model
from experts.training.latent_dataset import Batch, encode_latents
from experts.training.loss import expert_loss

SETTINGS = "cluster_conditioned.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConditionedExpert:
    """The one network, told one cluster; K of them share it, and stand for K experts in an ensemble."""

    shared: Expert
    """Knows (classes + 1) x clusters conditions."""
    cluster_id: int
    num_clusters: int

    @property
    def num_classes(self) -> int:
        """Classes of the data; 0 is unconditional."""
        return self.shared.num_classes // self.num_clusters - 1

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The noise path that the network was trained on."""
        return self.shared.noise_schedule

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent."""
        return self.shared.latent_shape

    def velocity(self, noised: Latents, t: Times, condition: Condition, path: NoiseSchedule | None = None) -> Latents:
        """The velocity on `path` (default: the network's own) of samples of this cluster."""
        clusters = torch.full_like(condition.class_id, self.cluster_id)
        told = with_cluster(condition, clusters, self.num_classes, self.num_clusters)
        return self.shared.velocity(noised, t, told, path)

    def to(self, device: torch.device | str) -> "ClusterConditionedExpert":
        """Move the shared network to a device, in place."""
        self.shared.to(device)
        return self

    def save(self, folder: Path) -> None:
        """Write the shared network, and how many clusters it knows."""
        self.shared.save(folder)
        write_json(folder / SETTINGS, {"num_clusters": self.num_clusters})

    @classmethod
    def load_all(cls, folder: Path) -> Mapping[int, "ClusterConditionedExpert"]:
        """The network once for every cluster; raises an `ArtifactError` if a file is missing or broken."""
        shared, said = Expert.load(folder), read_json(folder / SETTINGS)
        clusters = said.get("num_clusters") if isinstance(said, dict) else None
        if not isinstance(clusters, int) or clusters < 1 or not shared.num_classes or shared.num_classes % clusters:
            raise CorruptArtifact(
                f"{folder / SETTINGS} tells of {clusters} clusters, and the network knows {shared.num_classes} pairs "
                "of a class and a cluster; train it again"
            )
        return {k: cls(shared=shared, cluster_id=k, num_clusters=clusters) for k in range(clusters)}


def is_cluster_conditioned(folder: Path) -> bool:
    """Whether a folder holds a network that is told the cluster."""
    return (folder / SETTINGS).is_file()


def with_cluster(
    condition: Condition, cluster_id: Int[Tensor, " batch"], num_classes: int, num_clusters: int
) -> Condition:
    """The pair (class, cluster) as one class; the null class comes behind all others, with each cluster too."""
    return Condition(condition.embedding_index(num_classes) * num_clusters + cluster_id)


def train_cluster_conditioned(
    config: ExpertConfig, clusters: Sequence[Path], codec: Path, out: Path, workspace: Workspace
) -> ExpertSummary:
    """Train the network on the samples of all clusters, each with its cluster's number, and write it to `out`."""
    dataset = encode_latents(clusters, load_codec(codec), codec, workspace)
    num_classes, num_clusters = len(read_index(clusters[0]).class_names), len(clusters)
    check_classes(dataset, num_classes)
    pairs = (num_classes + 1) * num_clusters
    start = build_initial_model(config, dataset.latent_shape, pairs)

    def loss(model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        told = with_cluster(batch.condition, batch.cluster_id, num_classes, num_clusters)
        return {"loss": expert_loss(model, replace(batch, condition=told), start.prediction, start.noise_schedule)}

    summary = train_network(config.training, dataset, start, loss, out, workspace, pairs)
    write_json(out / SETTINGS, {"num_clusters": num_clusters})
    return summary
