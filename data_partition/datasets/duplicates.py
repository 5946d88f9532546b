"""Near-duplicates: the same picture again, mirrored, slightly cropped or saved with loss.

    images ──► exact hash of the pixels and of their mirror image
       └─────► pixel features of each image's crops and mirror images ──► the nearest images ──align──► residual

A crop of a few per cent moves every edge by a pixel, which is further in any feature space than another picture of the
same kind. So features only propose pairs. Each pair is aligned (Lucas and Kanade 1981: Gauss-Newton steps on size and
shift), and is a duplicate if what remains is a small part of the picture's contrast.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from itertools import chain
from operator import itemgetter
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from data_partition.config import DataConfig
from data_partition.datasets.source import Reading, Source, Unreadable, is_held_out
from data_partition.datasets.sources import open_reading
from data_partition.shards.images import fit_image
from data_partition.shards.shards import Sample
from ddm_core.artifacts import Preempted, Workspace

SIDE = 32
"""Longest side in pixels at which pictures are compared."""
MAX_RESIDUAL = 0.15
"""Largest root mean square difference after alignment of two duplicates, over the contrast of the picture."""
CELLS = 12
"""Large pixels a side of the features that propose pairs."""
CANDIDATES = 8
"""Nearest images of every image's crops that are aligned with it."""
CROPS = [(1.0, 1.0, 0.0, 0.0)] + [
    (side, side, (1 - side) * x, (1 - side) * y) for side in (0.93, 0.86) for y in (-1, 0, 1) for x in (-1, 0, 1)
]
"""Width, height and shifts of the crops that propose pairs, in halves of a picture; the first is the whole one."""
MIN_SIMILARITY = 0.75
"""Lowest correlation of a crop with an image that is aligned with it."""
ITERATIONS = 6
LOWEST_CROP, HIGHEST_CROP = torch.tensor([0.75, 0.75, -0.25, -0.25]), torch.tensor([1.1, 1.1, 0.25, 0.25])
MIN_CONTRAST = 0.02
"""Deviation of the pixels of a picture below which it shows nothing."""
BLOCK = 128
"""Pictures that are compared with all others at once."""

T = TypeVar("T")
Image = UInt8[np.ndarray, "height width channel"]
Pictures = Float[Tensor, "image channel height width"]
Reduced = tuple[bytes, Float[Tensor, "channel side side"]]
Crops = Float[Tensor, "image 4"]
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

    Time grows with the square of the number of images, memory with the number: about ten kilobytes each.
    """
    return compare_pictures(map(reduce_image, images))


def reduce_image(image: Image) -> Reduced:
    """Return a hash of an image and its mirror image, and a small picture of it: what is compared."""
    return min(sha256(side.tobytes()).digest() for side in (image, image[:, ::-1])), _shrink(image).half()


def compare_pictures(reduced: Iterable[Reduced]) -> list[Duplicate]:
    """Return the duplicates among images that are reduced, like `find_duplicates`."""
    first: dict[bytes, int] = {}
    equal, pictures = Pairs(), list[Tensor]()
    for row, (digest, picture) in enumerate(reduced):
        if (original := first.setdefault(digest, row)) != row:
            equal[original, row] = 0.0
        pictures.append(picture)
    pairs = (_aligned_pairs(torch.stack(pictures)) if pictures else Pairs()) | equal
    return _group(pairs)


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


def _shrink(image: Image) -> Float[Tensor, "channel side side"]:
    """Return a square of at most `SIDE` pixels a side, slightly blurred: crops and JPEG change the finest detail."""
    values = torch.tensor(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float().div(255)
    side = min(SIDE, *values.shape[2:])
    small = functional.interpolate(values, (side, side), mode="bilinear", antialias=True)
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    weight = (kernel[:, None] * kernel).expand(small.shape[1], 1, 3, 3)
    blurred: Tensor = functional.conv2d(
        functional.pad(small, (1, 1, 1, 1), mode="replicate"), weight, groups=small.shape[1]
    )
    return blurred[0]


def _warp(pictures: Pictures, crop: Crops) -> Pictures:
    """Return the cropped pictures at the same size; a crop is a width, a height and two shifts."""
    theta = pictures.new_zeros(len(pictures), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = crop[:, 0], crop[:, 1], crop[:, 2:]
    grid = functional.affine_grid(theta, list(pictures.shape), align_corners=False)
    return functional.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _features(pictures: Pictures) -> Float[Tensor, "image feature"]:
    """Return the grey values of a few large pixels, centered and of length one."""
    flat = functional.interpolate(pictures.mean(1, keepdim=True), (CELLS, CELLS), mode="area").flatten(1)
    return functional.normalize(flat - flat.mean(1, keepdim=True), dim=1)


def _aligned_pairs(pictures: Pictures) -> Pairs:
    """Return the pairs of which one is nearly a crop of the other, or of its mirror image, with what remains."""
    pairs = Pairs()
    targets = torch.cat([_features(block.float()) for block in torch.split(pictures, BLOCK)])
    for rows in torch.split(torch.arange(len(pictures)), BLOCK):
        sides = torch.cat([pictures[rows], pictures[rows].flip(-1)]).float()
        similarity = torch.full((len(rows), len(pictures)), -1.0)
        crop_of = torch.zeros(similarity.shape, dtype=torch.int64)
        for number, start in enumerate(CROPS):
            views = _features(_warp(sides, torch.tensor(start).expand(len(sides), 4))) @ targets.T
            for side, value in enumerate(torch.split(views, len(rows))):
                crop_of[value > similarity] = 2 * number + side
                similarity = torch.maximum(similarity, value)
        similarity[torch.arange(len(rows)), rows] = -1.0
        nearest = similarity.topk(min(CANDIDATES, len(pictures))).indices
        first, column = (similarity.gather(1, nearest) > MIN_SIMILARITY).nonzero(as_tuple=True)
        if not len(first):
            continue
        second = nearest[first, column]
        crop = crop_of[first, second]
        source = sides[first + (crop % 2) * len(rows)]
        starts = (torch.tensor(CROPS)[crop // 2], torch.tensor(CROPS)[:1].expand(len(source), 4))
        residuals = torch.stack([_align(source, pictures[second].float(), proposed) for proposed in starts]).amin(0)
        for a, b, residual in zip(rows[first].tolist(), second.tolist(), residuals.tolist(), strict=True):
            if residual <= MAX_RESIDUAL:
                pair = (min(a, b), max(a, b))
                pairs[pair] = min(residual, pairs.get(pair, residual))
    return pairs


def _align(source: Pictures, target: Pictures, crop: Crops) -> Float[Tensor, " image"]:
    """Return what remains of each target after the best crop of its source near a given one, over its contrast."""
    steps = 0.01 * torch.eye(4)
    for _ in range(ITERATIONS):
        difference = (target - _warp(source, crop)).flatten(1)
        slopes = [(_warp(source, crop + step) - _warp(source, crop - step)).flatten(1) / 0.02 for step in steps]
        jacobian = torch.stack(slopes, 2)
        normal = jacobian.mT @ jacobian + 1e-4 * torch.eye(4)
        change = torch.linalg.solve(normal, jacobian.mT @ difference[:, :, None])[:, :, 0]
        crop = (crop + change.clamp(-0.05, 0.05)).clamp(LOWEST_CROP, HIGHEST_CROP)
    flat = target.flatten(1)
    contrast = (flat - flat.mean(1, keepdim=True)).square().mean(1).sqrt().clamp(min=MIN_CONTRAST)
    return (target - _warp(source, crop)).flatten(1).square().mean(1).sqrt() / contrast


REPEATED = "repeats an earlier image"


def find_repeated(source: Source, config: DataConfig, workspace: Workspace) -> dict[str, str]:
    """Return the keys of repeated images, with those of the first; a test image that repeats a training image is one.

    `data.limit` counts the images before any is left out. Raises `Preempted`.
    """
    keys: list[str] = []
    readings = [until_limit(_map_reduced(workspace, "train", config, source.train), source, config, itemgetter(0))]
    if source.test is not None:
        readings.append(_map_reduced(workspace, "test", config, source.test))
    duplicates = compare_pictures(_count_images(chain(*readings), workspace, keys))
    return {keys[one.row]: keys[one.original] for one in duplicates}


def _map_reduced(
    workspace: Workspace, part: str, config: DataConfig, reading: Reading
) -> Iterator[tuple[str, Reduced]]:
    """Yield key and reduced image of every readable sample."""
    return workspace.engine.map(partial(_start_reducing, part, config), reading.list_pieces())


def _start_reducing(part: str, config: DataConfig) -> Callable[[Any], Iterator[tuple[str, Reduced]]]:
    reading = open_reading(part, config)

    def reduce(piece: Any) -> Iterator[tuple[str, Reduced]]:
        for sample in reading.read_piece(piece):
            if isinstance(sample, Sample):
                yield sample.key, reduce_image(fit_image(sample.image, config, sample.name or sample.key))

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


def _count_images(samples: Iterable[tuple[str, Reduced]], workspace: Workspace, keys: list[str]) -> Iterator[Reduced]:
    """Yield the reduced images, and append their keys."""
    for key, reduced in samples:
        keys.append(key)
        yield reduced
        workspace.report_progress(len(keys), None, unit="images")
        if workspace.stop_requested():
            raise Preempted(f"stopped after {len(keys)} images; reading starts again")


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
