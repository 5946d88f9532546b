"""Join the latents of folders, and of folders of shards that are encoded first, into one data set."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from data_partition.shards.shards import read_index
from ddm_core.artifacts import CACHE, Workspace, atomic_folder
from ddm_core.files.checksums import checksum
from experts.codec import Codec
from experts.conditions.captions import EncodedCaptions
from experts.conditions.text_encoder import TextEncoder
from experts.training.latent_dataset import LatentDataset, LatentError
from experts.training.latents.caption_costs import text_config
from experts.training.latents.encode import Encoding
from experts.training.latents.folder import (
    RECORD,
    LatentWriter,
    are_streamed,
    check_latents,
    has_latents,
    is_reusable,
    iter_blocks,
    keeps_texts,
    read_class_names,
    read_latents,
    read_record,
    with_images,
)
from experts.training.latents.shard_encoder import ENCODE_BATCH, FrozenCodec
from experts.training.parallel.distributed import DataParallelGroup


def encode_latents(
    folders: Sequence[Path],
    codec: Codec,
    codec_folder: Path,
    workspace: Workspace,
    text: TextEncoder | None = None,
) -> LatentDataset:
    """Return the samples of all folders; those of a folder of shards are encoded, finished latents are read.

    Later attempts reuse what lies in the scratch folder, if it still has its checksums. Raises `LatentError` if there
    are no samples or latents of another codec, and `Preempted`. In a group only rank 0 encodes.
    """
    is_ready = len(folders) == 1 and has_latents(folders[0]) and not keeps_texts(folders[0])
    folder = folders[0] if is_ready else workspace.scratch / CACHE / "latents"
    are_streamed(folders)
    DataParallelGroup.join().run_on_main(lambda: _prepare(folders, codec, codec_folder, workspace, text, folder))
    return with_images(read_latents(folder), folders, codec)


def _prepare(
    folders: Sequence[Path],
    codec: Codec,
    codec_folder: Path,
    workspace: Workspace,
    text: TextEncoder | None,
    out: Path,
) -> None:
    """Encode the folders of shards, check those of latents, and join all in `out`."""
    shards = [path for path in folders if not has_latents(path)]
    total, frozen = sum(read_index(path).count for path in shards), FrozenCodec.open(codec_folder, codec)
    encoding = Encoding(open_models=lambda: (frozen, text), workspace=workspace, total=total)
    parts = []
    for number, path in enumerate(folders):
        if path in shards:
            parts.append(encoding.encode_shards(path, workspace.scratch / CACHE / "parts" / str(number)))
            continue
        check_latents(path)
        if read_record(path)["origin"].get("codec") != frozen.checksums:
            raise LatentError(f"{path} has latents of another codec than {codec_folder}; encode its images again")
        parts.append([path])
    if not sum(len(read_latents(part)) for group in parts for part in group):
        raise LatentError(f"there are no samples in {', '.join(map(str, folders))}; train the other clusters only")
    origin = {"parts": [[checksum(part / RECORD) for part in group] for group in parts]}
    if out in folders or is_reusable(out, origin):
        return
    with atomic_folder(out) as temporary, LatentWriter(temporary, read_class_names(folders[0]), origin) as writer:
        for cluster_id, group in enumerate(parts):
            for block in itertools.chain.from_iterable(map(_iter_encoded, group)):
                writer.add(replace(block, cluster_id=torch.full_like(block.cluster_id, cluster_id)))


def _iter_encoded(folder: Path) -> Iterator[LatentDataset]:
    """Yield the latents of a folder in blocks, with their captions encoded; raises `TextError`."""
    latents = read_latents(folder)
    if latents.captions is None or not latents.captions.are_texts:
        yield from iter_blocks(latents)
        return
    text = TextEncoder.from_config(text_config(folder))
    for block in iter_blocks(latents, ENCODE_BATCH):
        if text is not None and (captions := block.captions) is not None:
            rows, _ = text.encode_and_count(captions.texts())
            counts = captions.first_caption.diff()
            encoded = EncodedCaptions.from_rows(rows, captions.null_text, counts, captions.weight)
            yield replace(block, captions=encoded)
