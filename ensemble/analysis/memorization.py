"""Test for memorization: compare samples with their nearest training images, for each expert.

    samples ──────────► distance to the nearest training image ──┐
    held-out images ──codec──► the same distance: thresholds ────┴──► audit.json, suspects.png

After Somepalli et al. 2022 (Diffusion Art or Digital Forgery?, arXiv:2212.03860) and the survey Replication in Visual
Diffusion Models: small data sets are memorized first, and a cluster is a small data set.
Held-out images pass through the codec like samples: otherwise its smoothing would be mistaken for copying.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64

from data_partition.features.extract import load_extractor
from data_partition.features.pixels import flatten_pixels
from data_partition.partition import Partition, load_partition
from data_partition.shards.shards import read_batches, read_index
from ddm_core.artifacts import read_json, write_json
from ensemble.config import AuditConfig
from ensemble.ensemble import Ensemble
from ensemble.evaluation.near_copies import MemorizationTest, compare_distances
from ensemble.evaluation.nearest_neighbors import (
    Images,
    NearestNeighbors,
    Space,
    extract_features,
    find_nearest,
    read_rows,
)
from ensemble.evaluation.reference import pass_through
from ensemble.evaluation.spaces import PIXELS
from ensemble.sampling.images import encode_png, image_grid
from experts.codec import Codec
from experts.conditions.condition import Condition
from router.config import SelectionConfig

Ids = Int64[np.ndarray, " image"]
HeldOutIds = Int64[np.ndarray, " held_out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedSpace:
    """Comparisons in one feature space."""

    overall: MemorizationTest
    clusters: tuple[MemorizationTest, ...]
    """Of the samples of each expert with the held-out images of its cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """A sample unusually near to a training image for its cluster."""

    seed: int
    cluster_id: int
    ratio: float
    """Distance over the median of the held-out images of its cluster."""
    training_key: str
    """The key of its nearest training image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Result of an audit."""

    training: int
    """Training images of the comparison."""
    made_by: str
    """Source of a sample's expert: `draw` (pinned to it by the selection) or `looks` (assigned by the partition)."""
    spaces: dict[str, AuditedSpace]
    suspects: tuple[Suspect, ...]
    """By increasing ratio, in pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedSamples:
    """Samples to audit."""

    images: Images
    seeds: Int64[np.ndarray, " image"]
    experts: Ids | None
    """The expert of each image, if its selection pinned it to one."""
    codec: Codec
    """The codec of the samples."""


def audit_samples(
    samples: AuditedSamples,
    dataset: Path,
    partition: Path,
    reference: Path,
    config: AuditConfig,
    out: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Audit:
    """Compare samples with all of `dataset/train`, and write `out/audit.json` and `out/suspects.png`."""
    total, loaded = read_index(dataset / "train").count, load_partition(partition)
    held_out = np.concatenate([*_reconstruct(samples.codec, dataset / "holdout")])
    queries = np.concatenate([samples.images, held_out])
    neighbors = find_nearest(queries, load_spaces(reference), dataset / "train", lambda done: on_progress(done, total))
    assigned = assign_clusters(loaded, queries)
    count = len(samples.images)
    expert_ids = assigned[:count] if samples.experts is None else samples.experts
    clusters = (expert_ids, assigned[count:])
    ratios = _distance_ratios(neighbors[PIXELS].distances, *clusters)
    order = np.argsort(ratios, kind="stable")[: config.suspects]
    training = read_rows(dataset / "train", neighbors[PIXELS].rows[order])
    audit = Audit(
        training=total,
        made_by="looks" if samples.experts is None else "draw",
        spaces={
            name: _audit_space(nearest, *clusters, loaded.num_clusters, config) for name, nearest in neighbors.items()
        },
        suspects=tuple(
            Suspect(
                seed=int(samples.seeds[row]),
                cluster_id=int(expert_ids[row]),
                ratio=float(ratios[row]),
                training_key=original.key,
            )
            for row, original in zip(order, training, strict=True)
        ),
    )
    write_json(out / "audit.json", audit)
    pictures = np.concatenate([samples.images[order], np.stack([original.image for original in training])])
    (out / "suspects.png").write_bytes(
        encode_png(image_grid(torch.from_numpy(pictures).float() / 255, columns=len(order)))
    )
    return audit


def pinned_experts(
    ensemble: Ensemble, seeds: Sequence[int], condition: Condition | None, selection: SelectionConfig
) -> Ids | None:
    """Return the expert to which each seed is pinned in all steps; None if a trajectory may change its expert."""
    if ensemble.num_experts == 1:
        return None
    routing = ensemble.init_routing(seeds, condition or Condition.null(len(seeds)), selection)
    gates = routing.fixed_gates(torch.zeros(len(seeds)))
    return None if gates is None else gates.argmax(1).numpy()


def load_spaces(reference: Path) -> Mapping[str, Space]:
    """Load pixels and the first other feature space of the reference."""
    names = read_json(reference / "reference.json")["config"]["spaces"]
    others = [name for name in names if name != PIXELS][:1]
    return {PIXELS: flatten_pixels} | {name: load_extractor(reference / "extractors" / name) for name in others}


def _reconstruct(codec: Codec, shards: Path) -> Iterator[Images]:
    for batch in read_batches(shards, 256):
        yield pass_through(codec, batch.images)


def assign_clusters(partition: Partition, images: Images) -> Ids:
    """Return the cluster that the partition assigns to each image."""
    extractor = partition.extractor
    if extractor is None:
        raise ValueError("a partition without its extractor cannot assign images; use load_partition(folder)")
    return partition.assign(extract_features(extractor, images))


def _audit_space(
    nearest: NearestNeighbors, expert_ids: Ids, held_out_clusters: HeldOutIds, num_clusters: int, config: AuditConfig
) -> AuditedSpace:
    samples, held_out = nearest.distances[: len(expert_ids)], nearest.distances[len(expert_ids) :]
    clusters = tuple(
        compare_distances(samples[expert_ids == k], held_out[held_out_clusters == k], config.quantiles)
        for k in range(num_clusters)
    )
    return AuditedSpace(overall=compare_distances(samples, held_out, config.quantiles), clusters=clusters)


def _distance_ratios(
    distances: Float[np.ndarray, " query"], expert_ids: Ids, held_out_clusters: HeldOutIds
) -> Float[np.ndarray, " image"]:
    """Return each sample's distance over the median of its cluster's held-out images, or of all if it has none."""
    samples, held_out = distances[: len(expert_ids)], distances[len(expert_ids) :]
    scale = np.full(len(expert_ids), np.median(held_out))
    for k in np.intersect1d(expert_ids, held_out_clusters):
        scale[expert_ids == k] = np.median(held_out[held_out_clusters == k])
    ratios: Float[np.ndarray, " image"] = samples / np.maximum(scale, np.finfo(np.float32).tiny)
    return ratios
