"""How much of a picture does each codec keep? (`make bench-codecs`) Held-out pictures through each.

Numbers are those of one latent. Codecs that train get equal CPU time on one thread; others take what their fit takes.
Sets that are not measured keep their rows.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.arms.damage import Images, load_photo_patches
from benchmarks.record import RESULTS, Claim, Listing, write_result
from data_partition.config import MAX_FEATURES, DataConfig
from data_partition.datasets.sources import emoji, parquet
from data_partition.features.efficientnet import EfficientNetFeatures, load_feature_network
from data_partition.shards.shards import Sample, ShardWriter
from ddm_core.artifacts import Workspace, read_json, to_jsonable
from ensemble.evaluation.feature_space import HeldOutSpace, scale_features
from ensemble.evaluation.nearest_neighbors import extract_features
from ensemble.evaluation.reference import pass_through
from ensemble.evaluation.scores import Distances
from ensemble.evaluation.spaces import RANKED_SPACE
from experts.codecs.registry import CODECS, fit_codec, load_codec
from experts.config import CodecConfig, TrainingConfig

COMPONENTS, NEIGHBOURS = 64, 3
PATCH = 4
CIFAR_PICTURES, CIFAR_HELD_OUT = 6000, 1000
TRIAL_STEPS = 12
"""Steps of the short fit from which the CPU time of a step follows."""
TRAINING = TrainingConfig(batch_size=64, lr=2e-3, weight_decay=1e-3)
WITH_AUTOENCODERS = "emoji, 32 px"
NOISE = 0.03
"""Noise on the latents in a training; more costs detail that the latents have."""
MAX_RATIO = 3.0
"""Largest Fréchet distance through a default codec, over that of real pictures from others."""
BEST = "patch_pca_conv"
"""The codec of pictures that this benchmark must confirm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureSet:
    """Training and held-out pictures."""

    name: str
    train: Images
    held_out: Images


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Held-out pictures through one codec."""

    data: str
    codec: str
    numbers: int
    cpu_s: float
    psnr: float
    perceptual: float
    """1 - cosine of the features of a picture before and after."""
    distances: Distances
    floor: float
    """Fréchet distance of as many training pictures."""

    @property
    def ratio(self) -> float:
        """Return the Fréchet distance over its floor."""
        return self.distances.fd / self.floor


def main() -> None:
    """Measure all codecs on all sets, write docs/benchmarks/codecs.json and print its claims."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="CPU seconds of a training")
    parser.add_argument(
        "--emoji", type=Path, nargs="*", default=[], help="archives with `image`, 64 pixels, same order"
    )
    parser.add_argument("--cifar", type=Path, help="folder of CIFAR-10 as Parquet files; measures nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    rows: list[Row] = []
    for pictures in [load_cifar(options.cifar)] if options.cifar else load_sets(options.emoji):
        for channels in (4, 12) if pictures.name == WITH_AUTOENCODERS else (12,):
            rows += measure(pictures, channels, options.seconds)
    note = (
        f"{', '.join(dict.fromkeys(row.data for row in rows))}: one thread, {options.seconds:g} CPU seconds of "
        f"training at batches of {TRAINING.batch_size}; components of whole images end at {MAX_FEATURES:,} values. KID "
        f"in thousandths, Fréchet distance (FD) in {COMPONENTS} components, both in EfficientNet-lite0 features; the "
        "floor is the FD of as many training pictures."
    )
    earlier = read_json(RESULTS / "codecs.json") if (RESULTS / "codecs.json").exists() else {}
    names = tuple({f"{row.data}, " for row in rows})
    claims = [Claim(**claim) for claim in earlier.get("claims", []) if not claim["name"].startswith(names)]
    listings = [Listing(**listing) for listing in earlier.get("listings", []) if not listing["title"].startswith(names)]
    result = write_result(
        "codecs",
        time.monotonic() - started,
        [*claims, *make_claims(rows)],
        [*listings, *make_listings(rows)],
        [*(earlier.get("notes", []) if listings else ()), note],
    )
    print(json.dumps(to_jsonable(result["claims"]), indent=1))


def load_cifar(folder: Path) -> PictureSet:
    """Return the first pictures of CIFAR-10, the very first as those that are held out."""
    source = parquet(DataConfig(source="parquet", path=str(folder), image_size=32, channels=3))
    samples = itertools.islice((sample for sample in source.train() if isinstance(sample, Sample)), CIFAR_PICTURES)
    images = np.stack([sample.image for sample in samples])
    return PictureSet(name="CIFAR-10, 32 px", train=images[CIFAR_HELD_OUT:], held_out=images[:CIFAR_HELD_OUT])


def load_sets(archives: Sequence[Path]) -> Iterator[PictureSet]:
    """Yield the sets of pictures; emoji of 64 pixels only from archives, a fifth of them held out in every style."""
    source = emoji(DataConfig(source="emoji", image_size=32, channels=3, holdout=0.2))
    train, held_out = (
        np.stack([sample.image for sample in samples() if isinstance(sample, Sample)])
        for samples in (source.train, source.test)
        if samples is not None
    )
    yield PictureSet(name=WITH_AUTOENCODERS, train=train, held_out=held_out)
    patches = load_photo_patches().images
    yield PictureSet(name="photo patches, 32 px", train=patches[800:], held_out=patches[:800])
    if archives:
        images = [np.load(file, allow_pickle=False)["image"] for file in archives]
        is_held_out = np.random.default_rng(0).permutation(len(images[0])) % 5 == 0
        parts = (np.concatenate([array[mask] for array in images]) for mask in (~is_held_out, is_held_out))
        yield PictureSet(name="emoji, 64 px", train=next(parts), held_out=next(parts))


def list_codecs(pictures: PictureSet, channels: int) -> Mapping[str, CodecConfig]:
    """Return every codec that fits the pictures with as many numbers as patches of `channels` components have.

    Autoencoders are trained on one set only: on all others they are as far behind.
    """
    shape = pictures.train.shape[1:]
    components = channels * (shape[0] // PATCH) * (shape[1] // PATCH)
    kinds = [kind for kind in CODECS if kind not in ("pixels", "autoencoder")]
    if pictures.name != WITH_AUTOENCODERS:
        kinds = [kind for kind in kinds if not kind.startswith("autoencoder")]
    if np.prod(shape) > MAX_FEATURES:
        kinds = [kind for kind in kinds if kind not in ("pca", "pca_conv")]
    sizes: dict[str, Any] = {"components": components, "patch_size": PATCH, "latent_channels": channels}
    training: dict[str, Any] = {"decoder_training": TRAINING, "decoder_noise": NOISE}
    return {kind: CodecConfig(**sizes | training | {"kind": kind}) for kind in kinds}


def measure(pictures: PictureSet, channels: int, seconds: float) -> Iterator[Row]:
    """Yield a row for each codec with `channels` numbers a patch."""
    features = EfficientNetFeatures(load_feature_network())

    def extract(images: Images) -> np.ndarray:
        return scale_features(extract_features(features, images))

    real = extract(pictures.held_out)
    space = HeldOutSpace.fit(RANKED_SPACE, real, COMPONENTS, NEIGHBOURS)
    others = pictures.train[np.random.default_rng(0).permutation(len(pictures.train))[: len(real)]]
    floor = space.compare(extract(others), NEIGHBOURS).fd
    for kind, config in list_codecs(pictures, channels).items():
        with tempfile.TemporaryDirectory() as folder:
            cpu_s = fit_for(config, pictures.train, seconds, Path(folder))
            codec = load_codec(Path(folder) / "codec")
        decoded = pass_through(codec, pictures.held_out)
        seen = extract(decoded)
        row = Row(
            data=pictures.name,
            codec=kind,
            numbers=int(np.prod(codec.latent_shape)),
            cpu_s=cpu_s,
            psnr=peak_signal_to_noise(decoded, pictures.held_out),
            perceptual=1 - float((seen * real).sum(axis=1).mean()) / real.shape[1],  # rows have length sqrt(features)
            distances=space.compare(seen, NEIGHBOURS),
            floor=floor,
        )
        print(row, flush=True)
        yield row


def fit_for(config: CodecConfig, images: Images, seconds: float, folder: Path) -> float:
    """Fit a codec below `folder`, train it for so many CPU seconds, and return the CPU seconds of the fit."""
    with ShardWriter(folder / "shards") as writer:
        for number, image in enumerate(images):
            writer.add(Sample(key=f"{number:06d}", image=image))
    writer.close()
    steps = 1
    if CODECS[config.kind].probe is not None:
        ends = _fit(config, TRIAL_STEPS, folder, "trial")[-TRIAL_STEPS:]
        steps = max(TRIAL_STEPS, round(seconds / float(np.median(np.diff(ends)))))
    times = _fit(config, steps, folder, "codec")
    return times[-1] - times[0]


def _fit(config: CodecConfig, steps: int, folder: Path, name: str) -> list[float]:
    """Fit a codec; return the CPU times of start, of each step's start, and of the end."""
    training = replace(config.decoder_training, steps=steps, warmup_steps=min(50, steps // 8))
    times = [time.process_time()]

    def note_step() -> bool:  # a training asks before each step whether it shall stop
        times.append(time.process_time())
        return False

    workspace = replace(Workspace.at(folder / f"work_{name}"), stopping=note_step)
    fit_codec(replace(config, decoder_training=training), folder / "shards", folder / name, workspace)
    return [*times, time.process_time()]


def peak_signal_to_noise(decoded: Images, real: Images) -> float:
    """Return the mean over pictures in decibels; at most 60, where the error of a picture vanishes."""
    errors = np.square((decoded.astype(np.float32) - real) / 255).mean(axis=(1, 2, 3))
    return float(np.mean(-10 * np.log10(np.maximum(errors, 1e-6))))


def make_claims(rows: Sequence[Row]) -> Iterator[Claim]:
    """Yield the bar of the default codec on each set, and the winner by KID at equal numbers."""
    for (data, numbers), group in itertools.groupby(rows, lambda row: (row.data, row.numbers)):
        by_codec = {row.codec: row for row in group}
        winner = min(by_codec.values(), key=lambda row: row.distances.kid or 0.0)
        yield Claim(
            name=f"{data}, {numbers:,} numbers: the smallest KID through a codec",
            bar=f"{BEST}'s",
            value=f"{winner.codec}'s",
            spread=f"{1000 * (winner.distances.kid or 0):.0f}; {BEST} {1000 * (by_codec[BEST].distances.kid or 0):.0f}",
            holds=winner.codec == BEST,
        )
        yield Claim(
            name=f"{data}, {numbers:,} numbers: FD of held-out pictures through {BEST} over the floor",
            bar=f"≤ {MAX_RATIO:g}",
            value=f"{by_codec[BEST].ratio:.2f}",
            spread=f"{by_codec[BEST].distances.fd:.1f} of {by_codec[BEST].floor:.1f}",
            holds=by_codec[BEST].ratio <= MAX_RATIO,
        )


def make_listings(rows: Sequence[Row]) -> list[Listing]:
    """Return a table for each set and number of numbers."""
    columns = ("codec", "CPU-s", "PSNR", "perceptual distance", "KID", "FD", "FD / floor")
    return [
        Listing(
            title=f"{data}, {numbers:,} numbers",
            columns=columns,
            rows=[
                (
                    row.codec,
                    f"{row.cpu_s:.1f}",
                    f"{row.psnr:.2f}",
                    f"{row.perceptual:.3f}",
                    f"{1000 * (row.distances.kid or 0):.0f}",
                    f"{row.distances.fd:.1f}",
                    f"{row.ratio:.2f}",
                )
                for row in group
            ],
        )
        for (data, numbers), group in itertools.groupby(rows, lambda row: (row.data, row.numbers))
    ]


if __name__ == "__main__":
    main()
