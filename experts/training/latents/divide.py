"""Divide the latents of a data set among its clusters."""

import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from data_partition.shards.shards import read_identities
from ddm_core.links import link_or_copy
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


def divide_latents(parts: Path, clusters: Sequence[Path], out: Path) -> None:
    """Write the latents of cluster k's shards, in their order, to `out/<k>`; `parts` has those of all samples.

    Where images are encoded when they are needed, `out/<k>` has their offset index too.

    Raises `LatentError` if a sample has no latents: the parts were encoded from other data.
    """
    folders = sorted(path for path in parts.iterdir() if has_latents(path))
    for folder in folders:
        check_latents(folder)
    origin = {name: value for name, value in read_record(folders[0])["origin"].items() if name != "shard"}
    latents = [read_latents(folder) for folder in folders]
    ids = np.concatenate([_sample_ids(part) for part in latents])
    order, starts = np.argsort(ids, kind="stable"), np.cumsum([0, *map(len, latents)])
    if (np.diff(ids[order]) == 0).any():
        raise LatentError(f"two samples of {parts} have the same key and content; give each sample a key of its own")
    for k, shards in enumerate(clusters):
        with LatentWriter(out / str(k), read_class_names(folders[0]), origin) as writer:
            writer.add(latents[0].select(torch.zeros(0, dtype=torch.int64)))
            for keys, wanted in _iter_identities(shards):
                found = order[np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)]
                if (unknown := np.flatnonzero(ids[found] != wanted)).size:
                    raise LatentError(
                        f"sample {keys[unknown[0]]!r} of {shards} has no latents in {parts}; they were encoded "
                        "from other data: encode this data set again"
                    )
                for run in np.split(found, np.flatnonzero(np.diff(np.searchsorted(starts, found, "right"))) + 1):
                    part = int(np.searchsorted(starts, run[0], "right")) - 1
                    writer.add(latents[part].select(torch.from_numpy(run - starts[part])))
        if are_streamed(folders):
            shutil.rmtree(images := out / str(k) / IMAGES, ignore_errors=True)
            shutil.copytree(shards, images, copy_function=link_or_copy)


def _iter_identities(shards: Path) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield the keys and the hashes of the samples of a folder of shards, some thousand at a time."""
    identities = read_identities(shards)
    while block := list(itertools.islice(identities, MATCH_ROWS)):
        yield [key for key, _ in block], np.array([sample_id for _, sample_id in block])


def _sample_ids(latents: LatentDataset) -> np.ndarray:
    if latents.sample_id is None:
        raise LatentError("these latents do not say to which samples they belong; encode the images again")
    return latents.sample_id.numpy()
