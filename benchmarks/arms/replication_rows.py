"""Rows of `benchmarks.papers` on replication: networks on small emoji, whose images are repeated or few."""

import functools
import io
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor

from benchmarks.arms.paper_networks import train_velocity
from benchmarks.arms.paper_row import PaperRow
from data_partition.datasets.duplicates import find_duplicates
from data_partition.datasets.packaged import read_emoji
from ensemble.analysis.replication import auc_error, membership_auc, sample_losses
from ensemble.evaluation.near_copies import near_neighbor_rate
from ensemble.solvers import euler, make_noise, uniform_times
from experts.conditions.condition import Condition
from experts.config import ResidualMLPConfig, TrainingConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.training.latent_dataset import LatentDataset

Images = UInt8[np.ndarray, "image 32 32 3"]
Latents = Float[Tensor, "image component"]

COMPONENTS = 48
NETWORK = ResidualMLPConfig(width=256, depth=3)
TRAINING = TrainingConfig(steps=1000, batch_size=64, lr=2e-3, warmup_steps=30, checkpoint_every=10**6)
SIZES = (50, 200, 800)
"""Numbers of training images."""
EXPERTS = (1, 4, 16)
PLANTED, VARIANTS = 20, 20
"""Repeated images, and how often each is repeated."""
SAMPLES, SAMPLING_STEPS = 500, 20
QUANTILE = 0.05
"""Share of held-out images that are as near to a training image as what counts as a copy."""


def measure_copies(folder: Path) -> PaperRow:
    """Train on 50, 200 and 800 images, and count samples that are near a training image."""
    latents, held_out = _read_latents()
    rates = [_copy_rate(_train(latents[:size], folder / str(size)), latents[:size], held_out) for size in SIZES]
    return PaperRow(
        paper="Replication in Visual Diffusion Models (survey)",
        says="small data sets are copied, and a cluster is a small data set",
        file="ensemble/analysis/memorization.py",
        command="ddm audit RUN",
        criterion="copy rate falls from 50 to 200 to 800 images, by chance .05 (the same network, as many steps)",
        ours=", ".join(f"{rate:.3f}" for rate in rates),
        theirs="no figure of its own",
        differs="emoji of 32 pixels in 48 principal components; held-out images set the distance",
        holds=rates == sorted(rates, reverse=True) and len({*rates}) == len(rates),
    )


def measure_duplicates(folder: Path) -> PaperRow:
    """Plant changed duplicates, look for them, and train with them, without those found, and without any."""
    images, _ = _read_images()
    originals, rng = images[:400], np.random.default_rng(0)
    rows = np.repeat(np.arange(PLANTED), VARIANTS)
    planted = np.stack([_change(originals[row], number, rng) for number, row in enumerate(rows)])
    everything = np.concatenate([originals, planted])
    found = {one.row: one.original for one in find_duplicates(everything)}
    recall = float(np.mean([found.get(400 + number) == row for number, row in enumerate(rows)]))
    wrong = sum(row < len(originals) for row in found) / len(originals)
    latents, held_out = _encode(everything), _read_latents()[1]
    kept = torch.tensor([row for row in range(len(everything)) if row not in found])
    sets = {"all": torch.arange(len(everything)), "scanned": kept, "clean": torch.arange(len(originals))}
    rates = {name: _copy_rate(_train(latents[rows], folder / name), latents, held_out) for name, rows in sets.items()}
    removed = (rates["all"] - rates["scanned"]) / (rates["all"] - rates["clean"])
    return PaperRow(
        paper="Replication in Visual Diffusion Models (survey), duplicates",
        says="repeated images are copied, and leaving them out prevents it",
        file="data_partition/datasets/duplicates.py",
        command="ddm run data.duplicates=remove",
        criterion="planted duplicates found ≥ .99; the scan removes ≥ .9 of the copies that they cause",
        ours=(
            f"found {recall:.4f}, and {wrong:.3f} of the others; copy rate {rates['all']:.3f}, after the scan "
            f"{rates['scanned']:.3f}, without duplicates {rates['clean']:.3f}: removed {removed:.3f}"
        ),
        theirs="no figure of its own",
        differs=f"{PLANTED} of 400 emoji, {VARIANTS} times each: mirrored, cropped, saved with loss",
        holds=recall >= 0.99 and removed >= 0.9,
    )


def measure_membership(folder: Path) -> PaperRow:
    """Train K = 1, 4 and 16 experts at equal FLOPs, and tell their training images from held-out ones by the loss."""
    latents, held_out = _read_latents()
    values, errors = [], []
    for count in EXPERTS:
        means = KMeans(count, n_init=4, random_state=0).fit(latents)
        clusters, others = (torch.tensor(means.predict(part)) for part in (latents, held_out))
        losses: list[list[Tensor]] = [[], []]
        for k in range(count):
            members = latents[clusters == k]
            expert = _train(members, folder / f"{count}_{k}", TRAINING.batch_size // count)
            for part, found in zip((members, held_out[others == k]), losses, strict=True):
                if len(part):
                    found.append(_losses(expert, part))
        values.append(membership_auc(*(torch.cat(found) for found in losses)))
        errors.append(auc_error(values[-1], len(latents), len(held_out)))
    return PaperRow(
        paper="Replication in Visual Diffusion Models (survey), membership",
        says="losses tell training images from others, the more the fewer images an expert has",
        file="ensemble/analysis/replication.py",
        command="ddm run scores.max_membership_auc=.8",
        criterion="AUC grows from K = 1 to 4 to 16 experts at equal FLOPs, by chance .5",
        ours=", ".join(f"{value:.3f} ± {error:.3f}" for value, error in zip(values, errors, strict=True)),
        theirs="no figure of its own",
        differs=f"{len(latents)} emoji, {len(held_out)} held out; batch divided by K, all losses together",
        holds=values == sorted(values) and len({*values}) == len(values),
    )


@functools.cache
def _read_images() -> tuple[Images, Images]:
    """Return the training images and the held-out images of one style, in a fixed random order."""
    parts = []
    for held_out in (False, True):
        images = [sample.image for sample in read_emoji(0.2, held_out=held_out) if sample.key.endswith("noto")]
        parts.append(np.stack(images)[np.random.default_rng(0).permutation(len(images))])
    return parts[0], parts[1]


@functools.cache
def _components() -> tuple[PCA, float]:
    """Return the principal components of the training images, and the deviation of their coordinates."""
    pca = PCA(COMPONENTS, random_state=0).fit(_flatten(_read_images()[0]))
    return pca, float(np.sqrt(pca.explained_variance_.mean()))


def _flatten(images: Images) -> Float[np.ndarray, "image pixel"]:
    return images.reshape(len(images), -1).astype(np.float32) / 255


def _encode(images: Images) -> Latents:
    pca, deviation = _components()
    return torch.tensor(pca.transform(_flatten(images)) / deviation).float()


@functools.cache
def _read_latents() -> tuple[Latents, Latents]:
    """Return the latents of the training images and of the held-out images."""
    first, second = map(_encode, _read_images())
    return first, second


def _dataset(latents: Latents) -> LatentDataset:
    nothing = torch.full((len(latents),), -1)
    return LatentDataset(clean=latents, class_id=nothing, cluster_id=0 * nothing)


def _train(latents: Latents, folder: Path, batch_size: int = TRAINING.batch_size) -> Expert:
    return train_velocity(NETWORK, _dataset(latents), TRAINING, batch_size, folder)


@torch.inference_mode()
def _copy_rate(expert: Expert, training: Latents, held_out: Latents) -> float:
    """Return the share of samples that are nearer to a training image than almost all held-out images."""
    condition = Condition.null(SAMPLES)
    noise = make_noise(range(SAMPLES), (COMPONENTS,))
    samples = euler(lambda noised, t: expert.velocity(noised, t, condition), noise, uniform_times(SAMPLING_STEPS))
    distances = [torch.cdist(part, training).amin(1).numpy() for part in (samples, held_out)]
    return near_neighbor_rate(distances[0], distances[1], QUANTILE).share


def _losses(expert: Expert, latents: Latents) -> Float[Tensor, " image"]:
    return sample_losses(expert.velocity, _dataset(latents), RECTIFIED_FLOW)


def _change(image: UInt8[np.ndarray, "32 32 3"], number: int, rng: np.random.Generator) -> UInt8[np.ndarray, "32 32 3"]:
    """Return the image mirrored, cropped by up to 4 % a side or saved with loss, or all or none of it."""
    mirrors, crops, loses = ((number % 5) in chosen for chosen in ((1, 4), (2, 4), (3, 4)))
    if crops:
        left, top, right, bottom = rng.uniform(0, 0.04, 4) * len(image)
        box = (left, top, len(image) - right, len(image) - bottom)
        image = np.asarray(Image.fromarray(image).resize(image.shape[:2], Image.Resampling.BICUBIC, box))
    image = np.ascontiguousarray(image[:, ::-1]) if mirrors else image
    if loses:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=75)
        image = np.asarray(Image.open(file))
    return image


ROWS = {"copies": measure_copies, "duplicates": measure_duplicates, "membership": measure_membership}
"""Measurements, by the names of their rows."""
