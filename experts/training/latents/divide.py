"""Divide the latents of a data set among its clusters."""

import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from jaxtyping import Int64

from data_partition.shards.shards import read_identities
from ddm_core.files.links import link_or_copy
from ddm_core.files.memmaps import create_memmap, open_rows
from ddm_core.hash_join import NOT_FOUND, find_positions
from experts.training.latent_dataset import LatentDataset, LatentError
from experts.training.latents.folder import (
    LatentWriter,
    are_streamed,
    check_latents,
    has_latents,
    read_class_names,
    read_latents,
    read_record,
)
from experts.training.latents.shard_encoder import MATCH_ROWS
from experts.training.streaming.image_stream import IMAGES

OPEN_PARTS = 16
"""Parts whose latents are open while they are divided."""


def divide_latents(parts: Path, clusters: Sequence[Path], out: Path) -> None:
    """Write the latents of cluster k's shards, in their order, to `out/<k>`; `parts` has those of all samples.

    Where images are encoded when they are needed, `out/<k>` has their offset index too. Memory does not grow with the
    number of samples: their hashes are matched on the disk, 24 bytes each while it runs.

    Raises `LatentError` if a sample has no latents: the parts were encoded from other data.
    """
    folders = sorted(path for path in parts.iterdir() if has_latents(path))
    for folder in folders:
        check_latents(folder)
    origin = {name: value for name, value in read_record(folders[0])["origin"].items() if name != "shard"}
    open_part = lru_cache(OPEN_PARTS)(read_latents)
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".matches-", dir=out) as matches:
        starts, found = _match_latents(folders, clusters, Path(matches))
        for k, (shards, first, stop) in enumerate(zip(clusters, found.firsts, found.firsts[1:], strict=False)):
            with LatentWriter(out / str(k), read_class_names(folders[0]), origin) as writer:
                writer.add(open_part(folders[0]).select(torch.zeros(0, dtype=torch.int64)))
                for start in range(first, stop, MATCH_ROWS):
                    rows = np.array(found.rows[start : min(start + MATCH_ROWS, stop)])
                    for run in np.split(rows, np.flatnonzero(np.diff(np.searchsorted(starts, rows, "right"))) + 1):
                        part = int(np.searchsorted(starts, run[0], "right")) - 1
                        writer.add(open_part(folders[part]).select(torch.from_numpy(run - starts[part])))
            if are_streamed(folders):
                shutil.rmtree(images := out / str(k) / IMAGES, ignore_errors=True)
                shutil.copytree(shards, images, copy_function=link_or_copy)


@dataclass(frozen=True, slots=True)
class _Matches:
    """Where the latents of samples are, cluster by cluster."""

    rows: Int64[np.ndarray, " sample"]
    """Position among those of all parts; memory-mapped."""
    firsts: list[int]
    """First sample of every cluster, and their number."""


def _match_latents(
    folders: Sequence[Path], clusters: Sequence[Path], matches: Path
) -> tuple[Int64[np.ndarray, " part"], _Matches]:
    """Return the first sample of every part, and where the samples of the clusters are, by files in `matches`.

    Raises `LatentError`.
    """
    starts, firsts = [0], [0]
    with (matches / "known").open("wb") as known, (matches / "wanted").open("wb") as wanted:
        for folder in folders:
            known.write((ids := _sample_ids(read_latents(folder))).tobytes())
            starts.append(starts[-1] + len(ids))
        for shards in clusters:
            identities = read_identities(shards)
            while block := [sample_id for _, sample_id in itertools.islice(identities, MATCH_ROWS)]:
                wanted.write(np.array(block, np.int64).tobytes())
            firsts.append(wanted.tell() // 8)
    rows = create_memmap(matches / "found.npy", np.int64, (firsts[-1],))
    if find_positions(open_rows(matches / "known"), open_rows(matches / "wanted"), rows) != NOT_FOUND:
        raise LatentError(
            f"two samples of {folders[0].parent} have the same key and content; give each sample a key of its own"
        )
    for shards, first, stop in zip(clusters, firsts, firsts[1:], strict=False):
        for start in range(first, stop, MATCH_ROWS):
            if (unknown := np.flatnonzero(rows[start : min(start + MATCH_ROWS, stop)] == NOT_FOUND)).size:
                key, _ = next(itertools.islice(read_identities(shards), start - first + int(unknown[0]), None))
                raise LatentError(
                    f"sample {key!r} of {shards} has no latents in {folders[0].parent}; they were encoded from other "
                    "data: encode this data set again"
                )
    return np.array(starts), _Matches(rows, firsts)


def _sample_ids(latents: LatentDataset) -> np.ndarray:
    if latents.sample_id is None:
        raise LatentError("these latents do not say to which samples they belong; encode the images again")
    return latents.sample_id.numpy()
