"""Pairs of pictures of which one is nearly a crop of the other, or of its mirror image, found among many on the disk.

    pictures ──► features ──k-means──► cells of similar pictures
       └──► the nearest of the few nearest cells ──crops──► candidates ──align──► residual

A picture is compared with those of its `PROBES` nearest cells, so time grows with the number of pictures, not with its
square. Up to `CELL_ROWS` pictures are one cell, and compared with all others.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.nn import functional

from data_partition.clustering.kmeans import assign_nearest, choose_training_rows, fit_fine_centroids
from ddm_core.engine import Engine, row_ranges
from ddm_core.files.memmaps import create_memmap

MAX_RESIDUAL = 0.25
"""Largest root mean square difference of two duplicates in any part of the picture, over the picture's contrast."""
PART = 4
"""Side of such a part in pixels of half the resolution: loss is spread, another picture differs in one place."""
CELLS = 12
"""Large pixels a side of the features that propose pairs."""
CANDIDATES = 16
"""Nearest images of every image's crops that are aligned with it."""
CROPS = [(1.0, 1.0, 0.0, 0.0)] + [
    (side, side, (1 - side) * x, (1 - side) * y) for side in (0.93, 0.86) for y in (-1, 0, 1) for x in (-1, 0, 1)
]
"""Width, height and shifts of the crops that propose pairs, in halves of a picture; the first is the whole one."""
MIN_SIMILARITY = 0.75
"""Lowest correlation of a crop with an image that is aligned with it."""
CELL_ROWS = 4096
"""Mean number of pictures of a cell."""
PROBES = 8
"""Nearest cells of a picture, and of its mirror image, that are looked at."""
PROPOSALS = 64
"""Nearest pictures of those cells whose similarity with all crops is computed."""
BLOCK = 256
"""Pictures that are compared at once."""
PIECE = 4096
"""Pictures of one piece of the work."""
SEED, CELL_ITERATIONS = 0, 10
"""Of the k-means of the cells."""
ITERATIONS, FIRST_ITERATIONS = 6, 3
HOPELESS = 2.0
"""Residual over `MAX_RESIDUAL` after the first iterations beyond which a pair is given up."""
LOWEST_CROP, HIGHEST_CROP = torch.tensor([0.75, 0.75, -0.25, -0.25]), torch.tensor([1.1, 1.1, 0.25, 0.25])
MIN_CONTRAST = 0.02
"""Deviation of the pixels of a picture below which it shows nothing."""

Pictures = Float[Tensor, "image channel height width"]
Features = Float[Tensor, "image feature"]
Crops = Float[Tensor, "image 4"]
Pair = tuple[int, int, float]
"""Positions of two images, the first of which comes earlier, and what remains after alignment."""


@dataclass(frozen=True)
class PictureFiles:
    """Small pictures in a file, with their features and their cells in others."""

    folder: Path
    count: int
    shape: tuple[int, int, int]

    @staticmethod
    def path(folder: Path) -> Path:
        """Return the file that the pictures are written to, as numbers of 16 bits."""
        return folder / "pictures.bin"

    @cached_property
    def pictures(self) -> np.ndarray:
        """Return the pictures, memory-mapped."""
        return np.memmap(self.path(self.folder), np.float16, "r", shape=(self.count, *self.shape))

    def read(self, rows: Int64[np.ndarray, " row"] | slice) -> Pictures:
        """Return some pictures."""
        return torch.from_numpy(np.array(self.pictures[rows])).float()

    def open(self, name: str) -> np.ndarray:
        """Return an array of `divide`, memory-mapped."""
        array: np.ndarray = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return array

    def divide(self) -> None:
        """Divide the pictures into cells of similar ones: `features` and `rows` in the order of the cells, `ends`."""
        width = CELLS * CELLS
        features = create_memmap(self.folder / "unsorted.npy", np.float16, (self.count, width))
        for start, stop in row_ranges(0, self.count, PIECE):
            features[start:stop] = compute_features(self.read(slice(start, stop))).half().numpy()
        num_cells = -(-self.count // CELL_ROWS)
        sample = features[choose_training_rows(self.count, num_cells, SEED)].astype(np.float32)
        centroids = fit_fine_centroids(sample, num_cells, CELL_ITERATIONS, SEED)
        np.save(self.folder / "centroids.npy", centroids)
        cells = create_memmap(self.folder / "cells.npy", np.int32, (self.count,))
        for start, stop in row_ranges(0, self.count, PIECE):
            cells[start:stop] = assign_nearest(features[start:stop].astype(np.float32), centroids)
        ends = np.cumsum(np.bincount(cells, minlength=num_cells))
        np.save(self.folder / "ends.npy", ends)
        ordered = create_memmap(self.folder / "features.npy", np.float16, (self.count, width))
        rows = create_memmap(self.folder / "rows.npy", np.int64, (self.count,))
        following = np.concatenate([[0], ends[:-1]])
        for start, stop in row_ranges(0, self.count, PIECE):
            order = np.argsort(cells[start:stop], kind="stable")
            sizes = np.bincount(cells[start:stop], minlength=num_cells)
            within = np.arange(stop - start) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            places = np.repeat(following, sizes) + within
            ordered[places], rows[places] = features[start:stop][order], start + order
            following += sizes


def find_near_pairs(files: PictureFiles, engine: Engine) -> Iterator[Pair]:
    """Yield the pairs of pictures of which one is nearly a crop of the other, or of its mirror image; some twice."""
    if files.count:
        files.divide()
        pieces = row_ranges(0, files.count, PIECE)
        yield from engine.map(partial(_start_pairing, files.folder, files.count, files.shape), pieces)


def _start_pairing(
    folder: Path, count: int, shape: tuple[int, int, int]
) -> Callable[[tuple[int, int]], Iterator[Pair]]:
    """Return the function that yields the pairs of the pictures of a range with all others."""
    files = PictureFiles(folder, count, shape)

    def pair(rows: tuple[int, int]) -> Iterator[Pair]:
        proposals = propose(files, *rows)
        for start, stop in row_ranges(*rows, BLOCK):
            yield from _verify(files, start, proposals[start - rows[0] : stop - rows[0]])

    return pair


def propose(files: PictureFiles, start: int, stop: int) -> Int64[np.ndarray, "image proposal"]:
    """Return the pictures that are nearest to those of a range or to their mirror images, -1 where there are fewer."""
    features, members, ends = files.open("features"), files.open("rows"), files.open("ends")
    centroids = np.asarray(files.open("centroids"))
    sides = files.read(slice(start, stop))
    sides = torch.cat([compute_features(sides), compute_features(sides.flip(-1))])
    own = torch.arange(start, stop)
    nearest = torch.from_numpy(_nearest_cells(sides.numpy(), centroids))
    width = min(PROPOSALS, files.count)
    values, found = torch.full((2, len(own), width), -2.0), torch.full((2, len(own), width), -1)
    for cell, end in enumerate(ends.tolist()):
        first = 0 if cell == 0 else int(ends[cell - 1])
        for chunk, last in row_ranges(first, end, 2 * CELL_ROWS):
            theirs = torch.from_numpy(features[chunk:last].astype(np.float32))
            rows = torch.from_numpy(np.array(members[chunk:last]))
            probing = (nearest == cell).any(1).nonzero()[:, 0]
            for queries in torch.split(probing, 2048):
                similarity = sides[queries] @ theirs.T
                side, image = queries // len(own), queries % len(own)
                similarity[rows[None] == own[image][:, None]] = -2.0
                merged = torch.cat([values[side, image], similarity], 1)
                numbers = torch.cat([found[side, image], rows.expand(len(queries), -1)], 1)
                values[side, image], place = merged.topk(width)
                found[side, image] = numbers.gather(1, place)
    best = torch.cat(list(values), 1).topk(width)
    chosen = torch.cat(list(found), 1).gather(1, best.indices)
    return torch.where(best.values > -2.0, chosen, -1).numpy()


def _nearest_cells(
    features: Float32[np.ndarray, "row feature"], centroids: Float32[np.ndarray, "cell feature"]
) -> Int64[np.ndarray, "row probe"]:
    """Return the `PROBES` nearest cells of each row (Euclidean)."""
    distances = 0.5 * np.square(centroids).sum(1) - features @ centroids.T
    probes = min(PROBES, len(centroids))
    return np.argpartition(distances, probes - 1, axis=1)[:, :probes]


def _verify(files: PictureFiles, start: int, proposals: Int64[np.ndarray, "image proposal"]) -> Iterator[Pair]:
    """Yield the pairs of consecutive pictures with their proposals that are duplicates after alignment."""
    own = torch.arange(start, start + len(proposals))
    pictures = files.read(slice(start, start + len(proposals)))
    sides = torch.cat([pictures, pictures.flip(-1)])
    others, positions = np.unique(proposals.clip(min=0), return_inverse=True)
    places = torch.from_numpy(positions.reshape(proposals.shape))
    theirs = files.read(others)
    targets = compute_features(theirs)[places]
    similarity, crop_of = torch.full(places.shape, -1.0), torch.zeros(places.shape, dtype=torch.int64)
    for number, crop in enumerate(CROPS):
        views = compute_features(warp(sides, torch.tensor(crop).expand(len(sides), 4)))
        for side, view in enumerate(torch.split(views, len(own))):
            value = (targets @ view[:, :, None])[:, :, 0]
            crop_of[value > similarity] = 2 * number + side
            similarity = torch.maximum(similarity, value)
    similarity[torch.from_numpy(proposals) < 0] = -1.0
    nearest = similarity.topk(min(CANDIDATES, similarity.shape[1])).indices
    first, column = (similarity.gather(1, nearest) > MIN_SIMILARITY).nonzero(as_tuple=True)
    second = nearest[first, column]
    crops = crop_of[first, second]
    for start, stop in row_ranges(0, len(first), BLOCK):
        a, b, c = first[start:stop], second[start:stop], crops[start:stop]
        one, other, proposed = sides[a + (c % 2) * len(own)], theirs[places[a, b]], torch.tensor(CROPS)[c // 2]
        inverse = torch.cat([1 / proposed[:, :2], -proposed[:, 2:] / proposed[:, :2]], 1)
        residual = torch.minimum(align(one, other, proposed), align(other, one, inverse))
        is_near = residual <= MAX_RESIDUAL
        rows = own[a[is_near]].tolist(), proposals[a[is_near].numpy(), b[is_near].numpy()].tolist()
        for row, found, value in zip(*rows, residual[is_near].tolist(), strict=True):
            yield min(row, found), max(row, found), value


def compute_features(pictures: Pictures) -> Features:
    """Return the grey values of a few large pixels, centered and of length one."""
    flat = functional.interpolate(pictures.mean(1, keepdim=True), (CELLS, CELLS), mode="area").flatten(1)
    return functional.normalize(flat - flat.mean(1, keepdim=True), dim=1)


def warp(pictures: Pictures, crop: Crops) -> Pictures:
    """Return the cropped pictures at the same size; a crop is a width, a height and two shifts."""
    theta = pictures.new_zeros(len(pictures), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = crop[:, 0], crop[:, 1], crop[:, 2:]
    grid = functional.affine_grid(theta, list(pictures.shape), align_corners=False)
    return functional.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)


def align(source: Pictures, target: Pictures, crop: Crops) -> Float[Tensor, " image"]:
    """Return what remains of each target after the best crop of its source near a given one, over its contrast.

    Gauss-Newton steps on width, height and shifts (Lucas and Kanade 1981). Pairs that are still far apart after the
    first steps are left there.
    """
    crop = _step(source, target, crop, FIRST_ITERATIONS)
    residual = _remainder(source, target, crop)
    near = (residual <= HOPELESS * MAX_RESIDUAL).nonzero()[:, 0]
    if not len(near):
        return residual
    source, target = source[near], target[near]
    aligned = _step(source, target, crop[near], ITERATIONS - FIRST_ITERATIONS)
    residual[near] = torch.minimum(residual[near], _remainder(source, target, aligned))
    return residual


def _step(source: Pictures, target: Pictures, crop: Crops, steps: int) -> Crops:
    """Return the crops after some steps; slopes are those of the cropped picture."""
    height, width = source.shape[2:]
    x, y = ((2 * torch.arange(side) + 1) / side - 1 for side in (width, height))
    for _ in range(steps):
        cropped = warp(source, crop)
        slope_y, slope_x = torch.gradient(cropped, dim=(2, 3))
        slope_x = slope_x * (width / 2) / crop[:, 0, None, None, None]
        slope_y = slope_y * (height / 2) / crop[:, 1, None, None, None]
        slopes = (slope_x * x, slope_y * y[:, None], slope_x, slope_y)
        jacobian = torch.stack([slope.flatten(1) for slope in slopes], 2)
        normal = jacobian.mT @ jacobian + 1e-4 * torch.eye(4)
        change = torch.linalg.solve(normal, jacobian.mT @ (target - cropped).flatten(1)[:, :, None])[:, :, 0]
        crop = (crop + change.clamp(-0.05, 0.05)).clamp(LOWEST_CROP, HIGHEST_CROP)
    return crop


def _remainder(source: Pictures, target: Pictures, crop: Crops) -> Float[Tensor, " image"]:
    """Return the largest root mean square difference of a part of a picture, at half the resolution."""
    flat = target.flatten(1)
    contrast = (flat - flat.mean(1, keepdim=True)).square().mean(1).sqrt().clamp(min=MIN_CONTRAST)
    difference = functional.avg_pool2d(target - warp(source, crop), 2).square().mean(1, keepdim=True)
    rows, columns = (-(-side // PART) for side in difference.shape[2:])
    return functional.adaptive_avg_pool2d(difference, (rows, columns)).flatten(1).amax(1).sqrt() / contrast
