"""Near-duplicates: the same picture again, mirrored, slightly cropped or saved with loss.

    images ──► hash of the pixels and of their mirror image ──► equal images
       └─────► small pictures ──► near pairs (`near_pairs.py`)

A crop of a few per cent moves every edge by a pixel, which is further in any feature space than another picture of the
same kind. So features only propose pairs. Each pair is aligned (Lucas and Kanade 1981: Gauss-Newton steps on size and
shift), and is a duplicate if no part of the picture remains different. Loss of quality is spread over a picture and
disappears at half the resolution; what another picture has changed is in one place.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import chain
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from data_partition.config import DataConfig
from data_partition.datasets.near_pairs import PictureFiles, find_near_pairs
from data_partition.datasets.source import Reading, Source, Unreadable, is_held_out
from data_partition.datasets.sources import open_reading
from data_partition.shards.images import fit_image
from data_partition.shards.shards import Sample
from ddm_core.artifacts import Preempted, Workspace
from ddm_core.engine import Engine, LocalEngine, row_ranges
from ddm_core.files.memmaps import create_memmap, open_rows
from ddm_core.hash_join import find_positions

HASHES = "hashes.bin"
"""File with the hash of every image."""

SIDE = 32
"""Longest side in pixels at which pictures are compared."""

T = TypeVar("T")
Image = UInt8[np.ndarray, "height width channel"]
Reduced = tuple[int, Float[np.ndarray, "channel side side"]]
Pairs = dict[tuple[int, int], float]
"""Positions of two images, the first of which comes earlier, to what remains after alignment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicate:
    """A picture that shows another one again."""

    row: int
    original: int
    """The first such picture."""
    residual: float
    """0 for equal pixels."""


def find_duplicates(images: Iterable[Image]) -> list[Duplicate]:
    """Return the images that repeat an earlier one, by their position, with the first of all that repeat each other.

    Time grows with the number of images. Memory grows with the number of duplicates; images are on the disk meanwhile,
    about seven kilobytes each.
    """
    with TemporaryDirectory() as folder:
        return compare_pictures(map(reduce_image, images), Path(folder), LocalEngine())


def reduce_image(image: Image, side: int = SIDE) -> Reduced:
    """Return a hash of an image and its mirror image, and a small picture of it: what is compared."""
    first = min(sha256(one.tobytes()).digest() for one in (image, image[:, ::-1]))
    return int.from_bytes(first[:8], "big", signed=True), _shrink(image, side).half().numpy()


def compare_pictures(reduced: Iterable[Reduced], folder: Path, engine: Engine) -> list[Duplicate]:
    """Return the duplicates among images that are reduced to one size, like `find_duplicates`; `folder` is emptied."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    count, shape = 0, (0, 0, 0)
    with (folder / HASHES).open("wb") as hashes, PictureFiles.path(folder).open("wb") as pictures:
        for digest, picture in reduced:
            hashes.write(digest.to_bytes(8, "little", signed=True))
            pictures.write(picture.tobytes())
            count, shape = count + 1, (picture.shape[0], picture.shape[1], picture.shape[2])
    pairs = Pairs()
    near = find_near_pairs(PictureFiles(folder, count, shape), engine)
    for one, other, residual in chain(near, _equal_pairs(folder, count)):
        pairs[one, other] = min(residual, pairs.get((one, other), residual))
    duplicates = _group(pairs)
    shutil.rmtree(folder)
    return duplicates


def _equal_pairs(folder: Path, count: int) -> Iterator[tuple[int, int, float]]:
    """Yield every image that equals an earlier one, or its mirror image, with the first such."""
    hashes, first = open_rows(folder / HASHES), create_memmap(folder / "first.npy", np.int64, (count,))
    find_positions(hashes, hashes, first)
    for start, stop in row_ranges(0, count, 2**20):
        rows = start + np.flatnonzero(first[start:stop] != np.arange(start, stop))
        yield from ((int(one), int(other), 0.0) for one, other in zip(first[rows], rows, strict=True))


def _group(pairs: Pairs) -> list[Duplicate]:
    """Return the duplicates: images of one chain of pairs repeat its first one, though only neighbors were aligned."""
    earlier, residuals = dict[int, int](), dict[int, float]()

    def first_of(row: int) -> int:
        while row in earlier:
            row = earlier[row]
        return row

    for (one, other), residual in pairs.items():
        first, second = sorted((first_of(one), first_of(other)))
        if first != second:
            earlier[second] = first
        for row in (one, other):
            residuals[row] = min(residual, residuals.get(row, residual))
    return [Duplicate(row=row, original=first_of(row), residual=residuals[row]) for row in sorted(earlier)]


def _shrink(image: Image, side: int) -> Float[Tensor, "channel side side"]:
    """Return a square of so many pixels a side, slightly blurred: crops and JPEG change the finest detail."""
    values = torch.tensor(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float().div(255)
    small = functional.interpolate(values, (side, side), mode="bilinear", antialias=True)
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    weight = (kernel[:, None] * kernel).expand(small.shape[1], 1, 3, 3)
    blurred: Tensor = functional.conv2d(
        functional.pad(small, (1, 1, 1, 1), mode="replicate"), weight, groups=small.shape[1]
    )
    return blurred[0]


REPEATED = "repeats an earlier image"


def find_repeated(source: Source, config: DataConfig, workspace: Workspace) -> dict[str, str]:
    """Return the keys of repeated images, with those of the first; a test image that repeats a training image is one.

    `data.limit` counts the images before any is left out. Raises `Preempted`.
    """
    readings = [until_limit(_map_reduced(workspace, "train", config, source.train), source, config, itemgetter(0))]
    if source.test is not None:
        readings.append(_map_reduced(workspace, "test", config, source.test))
    names = workspace.scratch / "duplicate_keys.txt"
    with names.open("w", encoding="utf-8", newline="\n") as keys:
        reduced = _count_images(chain(*readings), workspace, keys)
        duplicates = compare_pictures(reduced, workspace.scratch / "duplicates", workspace.engine)
    rows = {row for one in duplicates for row in (one.row, one.original)}
    with names.open(encoding="utf-8", newline="\n") as lines:
        key_of = {row: line.rstrip("\n") for row, line in enumerate(lines) if row in rows}
    names.unlink()
    return {key_of[one.row]: key_of[one.original] for one in duplicates}


def _map_reduced(
    workspace: Workspace, part: str, config: DataConfig, reading: Reading
) -> Iterator[tuple[str, Reduced]]:
    """Yield key and reduced image of every readable sample."""
    return workspace.engine.map(partial(_start_reducing, part, config), reading.list_pieces())


def _start_reducing(part: str, config: DataConfig) -> Callable[[Any], Iterator[tuple[str, Reduced]]]:
    reading, side = open_reading(part, config), min(SIDE, *chain(*config.sizes))

    def reduce(piece: Any) -> Iterator[tuple[str, Reduced]]:
        for sample in reading.read_piece(piece):
            if isinstance(sample, Sample):
                yield sample.key, reduce_image(fit_image(sample.image, config, sample.name or sample.key), side)

    return reduce


def until_limit(samples: Iterable[T], source: Source, config: DataConfig, key_of: Callable[[T], str]) -> Iterator[T]:
    """Yield the training samples, and those held out between them, until the limit; an empty key does not count."""
    count = 0
    for sample in samples:
        yield sample
        key = key_of(sample)
        count += bool(key) and not (source.test is None and is_held_out(key, config.holdout))
        if count == config.limit:
            break


def _key_of(sample: Sample | Unreadable) -> str:
    return sample.key if isinstance(sample, Sample) else ""


def _count_images(samples: Iterable[tuple[str, Reduced]], workspace: Workspace, keys: TextIO) -> Iterator[Reduced]:
    """Yield the reduced images, and write their keys."""
    for done, (key, reduced) in enumerate(samples, 1):
        keys.write(f"{key}\n")
        yield reduced
        workspace.report_progress(done, None, unit="images")
        if workspace.stop_requested():
            raise Preempted(f"stopped after {done} images; reading starts again")


def leave_out_repeated(
    samples: Iterable[Sample | Unreadable], source: Source, config: DataConfig, repeated: Mapping[str, str]
) -> Iterator[Sample | Unreadable]:
    """Yield the training samples of which `find_repeated` found the repeated ones, until the same limit."""
    return mark_repeated(until_limit(samples, source, config, _key_of), repeated)


def mark_repeated(
    samples: Iterable[Sample | Unreadable], originals: Mapping[str, str]
) -> Iterator[Sample | Unreadable]:
    """Yield the samples, an `Unreadable` in place of each that repeats another one."""
    for sample in samples:
        original = originals.get(sample.key)
        if original is None or not isinstance(sample, Sample):
            yield sample
        else:
            name = f"{sample.name or sample.key}, as {original}"
            yield Unreadable(key=sample.key, reason=REPEATED, name=name, is_image=False)
