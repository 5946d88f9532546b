"""Does the ensemble copy? Samples beside their nearest training images, for each expert apart.

    samples ──────────► distance to the nearest training image ──┐
    held-out images ──codec──► the same distance: thresholds ────┴──► audit.json, suspects.png

After Somepalli et al. 2022 (Diffusion Art or Digital Forgery?, arXiv:2212.03860) and the survey Replication in Visual
Diffusion Models: small data sets are memorised first, and a cluster is a small data set.
Held-out images go through the codec as samples do: without that, all that the codec smooths away looks like copying.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.stats import betabinom, binomtest

from data_partition.features.extract import load_extractor
from data_partition.features.pixels import flat
from data_partition.partition import Partition, load_partition
from data_partition.shards.shards import read_batches, read_index
from ddm_core.artifacts import read_json, write_json
from ensemble.analysis.nearest_neighbors import Images, NearestNeighbors, Space, features_of, find_nearest, read_rows
from ensemble.config import AuditConfig
from ensemble.ensemble import Ensemble
from ensemble.evaluation.reference import PIXELS
from ensemble.sampling.images import grid, png, to_bytes
from experts.codec import Codec
from experts.condition import Condition
from router.config import SelectionConfig

CONFIDENCE = 0.95

Distances = Float[np.ndarray, " image"]
OtherDistances = Float[np.ndarray, " other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NearNeighborRate:
    """The samples that are nearer to the training set than nearly all held-out images."""

    quantile: float
    """The share of held-out images that was asked for."""
    expected: float
    """What a generator without memory is expected to show; the nearest that so many held-out images can tell."""
    threshold: float
    """Distance below which a sample counts."""
    share: float
    low: float
    """Lower end of the 95 % interval of `share` (Clopper and Pearson 1934, doi:10.1093/biomet/26.4.404)."""
    high: float
    usual: float
    """Without memorising, `share` is at most this in 97.5 % of all cases, the chance of the threshold included."""
    p_value: float
    """How probable so many near samples, or more, are without memorising."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorizationTest:
    """A set of samples beside the held-out images that it is measured by."""

    samples: int
    held_out: int
    ratio: float | None
    """Mean distance to the nearest training image over that of held-out images; None if either is without images."""
    shares: tuple[NearNeighborRate, ...]
    """By quantile; empty if there are no samples, or no held-out images."""


def measure_memorization(samples: Distances, held_out: OtherDistances, quantiles: Sequence[float]) -> MemorizationTest:
    """Distances of samples to the training set beside those of held-out images."""
    sizes = len(samples), len(held_out)
    mean = float(held_out.mean()) if all(sizes) else 0.0
    return MemorizationTest(
        samples=sizes[0],
        held_out=sizes[1],
        ratio=float(samples.mean()) / mean if mean > 0 else None,
        shares=tuple(near_neighbor_rate(samples, held_out, quantile) for quantile in quantiles) if all(sizes) else (),
    )


def near_neighbor_rate(samples: Distances, held_out: OtherDistances, quantile: float) -> NearNeighborRate:
    """The share of `samples` below the held-out images' quantile."""
    count, known = len(samples), len(held_out)
    rank = min(max(1, round(quantile * (known + 1))), known)
    threshold = float(np.partition(held_out, rank - 1)[rank - 1])
    nearer = int((samples < threshold).sum())
    interval = binomtest(nearer, count).proportion_ci(CONFIDENCE)
    fresh = betabinom(count, rank, known + 1 - rank)
    return NearNeighborRate(
        quantile=quantile,
        expected=rank / (known + 1),
        threshold=threshold,
        share=nearer / count,
        low=float(interval.low),
        high=float(interval.high),
        usual=float(fresh.ppf((1 + CONFIDENCE) / 2)) / count,
        p_value=float(fresh.sf(nearer - 1)),
    )


Ids = Int64[np.ndarray, " image"]
HeldOutIds = Int64[np.ndarray, " held_out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedSpace:
    """Nearness in one feature space."""

    overall: MemorizationTest
    clusters: tuple[MemorizationTest, ...]
    """Of the samples that each expert made, measured by the held-out images of its own cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """A sample that is near to a training image for one of its cluster."""

    seed: int
    cluster_id: int
    ratio: float
    """Distance over the median of its cluster's held-out images."""
    training_key: str
    """The key of its nearest training image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """How near samples come to the training set."""

    training: int
    """Training images that were compared with."""
    made_by: str
    """How a sample's expert is known: `draw` (it was pinned to one) or `looks` (the partition's rule)."""
    spaces: dict[str, AuditedSpace]
    suspects: tuple[Suspect, ...]
    """The nearest samples first, by pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedSamples:
    """What is audited."""

    images: Images
    seeds: Int64[np.ndarray, " image"]
    experts: Ids | None
    """The expert that made each image, if a draw has pinned it to one."""
    codec: Codec
    """That the images went through."""


def audit_samples(
    samples: AuditedSamples,
    dataset: Path,
    partition: Path,
    reference: Path,
    config: AuditConfig,
    out: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Audit:
    """Compare samples with all of `dataset/train`; writes `out/audit.json` and `out/suspects.png`."""
    total, division = read_index(dataset / "train").count, load_partition(partition)
    held_out = np.concatenate([*_seen_through(samples.codec, dataset / "holdout")])
    queries = np.concatenate([samples.images, held_out])
    found = find_nearest(queries, audit_spaces(reference), dataset / "train", lambda done: on_progress(done, total))
    looks = cluster_by_features(division, queries)
    count = len(samples.images)
    made = looks[:count] if samples.experts is None else samples.experts
    clusters = (made, looks[count:])
    scores = _suspicion(found[PIXELS].distances, *clusters)
    order = np.argsort(scores, kind="stable")[: config.suspects]
    training = read_rows(dataset / "train", found[PIXELS].rows[order])
    audit = Audit(
        training=total,
        made_by="looks" if samples.experts is None else "draw",
        spaces={name: _audited(nearest, *clusters, division.num_clusters, config) for name, nearest in found.items()},
        suspects=tuple(
            Suspect(
                seed=int(samples.seeds[row]),
                cluster_id=int(made[row]),
                ratio=float(scores[row]),
                training_key=original.key,
            )
            for row, original in zip(order, training, strict=True)
        ),
    )
    write_json(out / "audit.json", audit)
    shown = np.concatenate([samples.images[order], np.stack([original.image for original in training])])
    (out / "suspects.png").write_bytes(png(grid(torch.from_numpy(shown).float() / 255, columns=len(order))))
    return audit


def drawn_experts(
    ensemble: Ensemble, seeds: Sequence[int], class_ids: Sequence[int] | None, selection: SelectionConfig
) -> Ids | None:
    """The expert that each seed was pinned to from the first step to the last; None if it may have changed."""
    condition = Condition.null(len(seeds)) if class_ids is None else Condition(torch.tensor(list(class_ids)))
    if ensemble.num_experts == 1:
        return None
    gates = ensemble.init_routing(seeds, condition, selection).fixed_gates(torch.zeros(len(seeds)))
    return None if gates is None else gates.argmax(1).numpy()


def audit_spaces(reference: Path) -> Mapping[str, Space]:
    """Pixels as they are, and the first space of the reference in which distance is more than that of pixels."""
    names = read_json(reference / "reference.json")["config"]["spaces"]
    others = [name for name in names if name != PIXELS][:1]
    return {PIXELS: flat} | {name: load_extractor(reference / "extractors" / name) for name in others}


def _seen_through(codec: Codec, shards: Path) -> Iterator[Images]:
    for batch in read_batches(shards, 256):
        yield to_bytes(codec.decode(codec.encode(batch.images)))


def cluster_by_features(division: Partition, images: Images) -> Ids:
    """The cluster of each image by the partition's rule."""
    extractor = division.extractor
    if extractor is None:
        raise ValueError("a partition without its extractor cannot assign images; use load_partition(folder)")
    return division.assign(features_of(extractor, images))


def _audited(
    nearest: NearestNeighbors, made: Ids, looks: HeldOutIds, num_clusters: int, config: AuditConfig
) -> AuditedSpace:
    samples, held_out = nearest.distances[: len(made)], nearest.distances[len(made) :]
    clusters = tuple(
        measure_memorization(samples[made == k], held_out[looks == k], config.quantiles) for k in range(num_clusters)
    )
    return AuditedSpace(overall=measure_memorization(samples, held_out, config.quantiles), clusters=clusters)


def _suspicion(distances: Float[np.ndarray, " query"], made: Ids, looks: HeldOutIds) -> Float[np.ndarray, " image"]:
    """Distance of every sample over the median of its cluster's held-out images, or of all if it has none."""
    samples, held_out = distances[: len(made)], distances[len(made) :]
    scale = np.full(len(made), np.median(held_out))
    for k in np.intersect1d(made, looks):
        scale[made == k] = np.median(held_out[looks == k])
    ratios: Float[np.ndarray, " image"] = samples / np.maximum(scale, np.finfo(np.float32).tiny)
    return ratios
