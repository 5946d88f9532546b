"""Encode the samples of shards once: their latents, and the texts of their captions.

Every shard becomes a folder of its own, so that an attempt continues with the shards that earlier ones have finished.
A sample is known by a hash of its key and its files: latents of a renamed or changed sample belong to no other.
"""

import itertools
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from data_partition.shards.shards import (
    ImageBatch,
    ShardIndex,
    decode_sample,
    identify_sample,
    read_encoded,
    read_identities,
    read_index,
    read_without_images,
    stack_samples,
)
from ddm_core.artifacts import CACHE, Preempted, Workspace, atomic_folder, checksum, list_files
from ddm_core.json_values import from_json
from ddm_core.links import link_or_copy
from experts.codec import Codec, encoder_folder
from experts.conditions.captions import EncodedCaptions
from experts.conditions.condition import NULL_CLASS
from experts.conditions.text_encoder import TextEncoder
from experts.config import TextConfig
from experts.training.flops import forward_flops
from experts.training.latent_dataset import LatentDataset, LatentError
from experts.training.latent_folder import (
    RECORD,
    STREAMED,
    LatentWriter,
    are_streamed,
    check_latents,
    has_latents,
    is_reusable,
    iter_blocks,
    keeps_texts,
    read_latents,
    read_record,
    with_images,
)
from experts.training.parallel.distributed import DataParallelGroup
from experts.training.streaming.image_stream import IMAGES
from experts.types import Images, Latents

T = TypeVar("T")

ENCODE_BATCH = 512
MATCH_ROWS = 4096
"""Samples whose latents are looked up at a time."""

TEXT = "text"
"""Folder that names the text encoder beside the latents of a data set."""


@dataclass(frozen=True)
class FrozenCodec:
    """A codec, where it runs, and what it is known by."""

    codec: Codec
    checksums: dict[str, str]
    """Of its files."""
    device: torch.device | str = "cpu"
    stored_type: torch.dtype = torch.float32
    """Type of its latents on the disk."""

    @classmethod
    def open(
        cls,
        folder: Path,
        codec: Codec,
        device: torch.device | str = "cpu",
        stored_type: torch.dtype = torch.float32,
    ) -> "FrozenCodec":
        """Return the codec that was loaded from a folder; it is known by the files that encode."""
        encoder = encoder_folder(folder)
        checksums = {str(path.relative_to(encoder)): checksum(path) for path in list_files(encoder)}
        return cls(codec, checksums, device, stored_type)

    def encode(self, images: Images) -> Latents:
        """Return the latents of images of one size as they are stored, in CPU memory."""
        with torch.device(self.device):
            return self.codec.with_size(*images.shape[1:3]).encode(images).cpu().to(self.stored_type)

    def shapes(self, index: ShardIndex) -> list[tuple[int, ...]]:
        """Return the shapes of latents of shards with buckets, the square first; empty without buckets."""
        sizes = [(height, width) for height, width, _ in index.image_shapes] if index.buckets else []
        return [self.codec.with_size(*size).latent_shape for size in sizes]

    @property
    def origin(self) -> dict[str, Any]:
        """Return what latents of this codec record."""
        return {"codec": self.checksums, "stored_type": str(self.stored_type)}


OpenModels = Callable[[], tuple[FrozenCodec, TextEncoder | None]]
"""Loads the codec and the text encoder."""


@dataclass(frozen=True)
class _ShardEncoder:
    """Encodes the shards of a folder, each into a folder below `out`, with a codec and a text encoder."""

    codec: FrozenCodec
    text: TextEncoder | None
    shards: Path
    out: Path
    flip: bool
    """Whether the mirrored images are encoded too."""
    stores_latents: bool
    """Whether images are encoded, and not only captions."""
    counts: Counter[str] = field(default_factory=Counter)
    """Of the current shard: captions that were `cut`, and bytes that captions take less than their encodings."""

    @classmethod
    def start(cls, open_models: OpenModels, *arguments: Any) -> Callable[[int], Iterator[int]]:
        """Load the models and return the function that encodes a shard."""
        return cls(*open_models(), *arguments).encode_shard

    @cached_property
    def index(self) -> ShardIndex:
        """Return the index of the shards."""
        return read_index(self.shards)

    @property
    def reads_classes(self) -> bool:
        """Return whether models read the classes of the samples."""
        return self.text is None or self.text.config.classes

    def encode_shard(self, number: int) -> Iterator[int]:
        """Encode a shard, unless it is encoded; yield the number of its samples that were encoded since the last."""
        index, shapes, part = self.index, self.codec.shapes(self.index), part_folder(self.out, number)
        count, start, done = index.shard_counts[number], sum(index.shard_counts[:number]), 0
        origin = {"shard": index.checksums[number], **self.codec.origin, "text": self.text and self.text.config}
        origin |= ({"flip": True} if self.flip else {}) | ({} if self.stores_latents else {"images": STREAMED})
        if is_reusable(part, origin):
            yield count
            return
        class_names = index.class_names if self.reads_classes else ()
        with atomic_folder(part) as temporary, LatentWriter(temporary, class_names, origin) as writer:
            for batch, ids in self._read(start, count, f"{self.shards}, shard {number}"):
                yield done
                encoded = self._encode(batch, ids)
                writer.add(encoded.in_bucket(index.bucket_of(number), shapes) if shapes else encoded)
                done = len(ids)
            writer.counts.update(self.counts)
            self.counts.clear()
        yield done

    def _read(self, start: int, count: int, name: str) -> Iterator[tuple[ImageBatch, list[int]]]:
        """Yield samples of a shard in batches, with their hashes; without images if these are not encoded."""
        if not self.stores_latents:
            identities = itertools.islice(read_identities(self.shards), start, start + count)
            for first in range(start, start + count, MATCH_ROWS):
                batch = read_without_images(self.shards, first, min(first + MATCH_ROWS, start + count))
                yield batch, [sample_id for _, sample_id in itertools.islice(identities, len(batch.keys))]
            return
        samples = itertools.islice(read_encoded(self.shards, start), count)
        for block in _batches(samples, _batch_rows(self.index.image_shape)):
            yield stack_samples([decode_sample(encoded, name) for encoded in block]), list(map(identify_sample, block))

    def _encode(self, batch: ImageBatch, sample_ids: list[int]) -> LatentDataset:
        """Encode some samples."""
        clean, mirrored = self._encode_images(batch.images), np.ascontiguousarray(batch.images[:, :, ::-1])
        return LatentDataset(
            clean=clean,
            class_id=torch.from_numpy(batch.labels if self.reads_classes else np.full_like(batch.labels, NULL_CLASS)),
            cluster_id=torch.zeros(len(clean), dtype=torch.int64),
            sample_id=torch.tensor(sample_ids, dtype=torch.int64),
            captions=None if self.text is None else self._encode_captions(self.text, batch),
            flipped=self._encode_images(mirrored) if self.flip else None,
        )

    def _encode_images(self, images: Images) -> Latents:
        return self.codec.encode(images) if self.stores_latents else torch.zeros(len(images), 0)

    def _encode_captions(self, text: TextEncoder, batch: ImageBatch) -> EncodedCaptions:
        """Encode or keep all captions of every sample: the first one is used once, each other by its frequency."""
        captions = [[(first, 1.0), *more] for first, more in zip(batch.captions, batch.more_captions, strict=True)]
        flat = [caption for of_sample in captions for caption in of_sample]
        texts, weights = [caption for caption, _ in flat], torch.tensor([weight for _, weight in flat])
        counts = torch.tensor([len(of_sample) for of_sample in captions])
        if text.config.stored_as == "captions":
            kept = EncodedCaptions.from_texts(texts, text.null_text, counts, weights)
            tokens = text.count_tokens(kept.texts())
            self.counts["cut"] += sum(count > text.config.length for count in tokens)
            self.counts["saved"] += _encoded_bytes(text, tokens) - len(kept.token_features)
            return kept
        rows, num_cut = text.encode_and_count(texts)
        self.counts["cut"] += num_cut
        return EncodedCaptions.from_rows(rows, text.null_text, counts, weights)


@dataclass(frozen=True, kw_only=True)
class _Encoding:
    """Folders of shards that are encoded one after the other, and how many of how many samples are done."""

    open_models: OpenModels
    workspace: Workspace
    total: int
    group: DataParallelGroup = DataParallelGroup()
    """Workers that encode together, each its share of the shards."""
    done: list[int] = field(default_factory=list)

    def encode_shards(self, shards: Path, out: Path, *, flip: bool = False, stores_latents: bool = True) -> list[Path]:
        """Encode every shard of a folder into a folder below `out`, unless it is there; raises `Preempted`.

        With `flip` the mirrored images are encoded too. A worker of a group leaves the shards of the others to them.
        """
        numbers = range(len(read_index(shards).shards))
        start = partial(_ShardEncoder.start, self.open_models, shards, out, flip, stores_latents)
        ours = numbers[self.group.rank :: self.group.size]
        with closing(self.workspace.engine.map(start, ours)) as counts:
            for count in counts:
                self.done.append(count)
                all_done = min(sum(self.done) * self.group.size, self.total)
                self.workspace.report_progress(all_done, self.total, unit="images encoded")
                if self.workspace.stop_requested():
                    done = f"{sum(self.done)} of {self.total}"
                    raise Preempted(f"stopped after {done} images; run the same command again to continue")
        return [part_folder(out, number) for number in numbers]


def part_folder(out: Path, shard: int) -> Path:
    """Return the folder of the latents of a shard."""
    return out / f"{shard:05d}"


def encode_dataset(
    dataset: Path,
    codec: FrozenCodec,
    text: TextEncoder | None,
    out: Path,
    workspace: Workspace,
    *,
    flip: bool = False,
    stores_latents: bool = True,
    open_models: OpenModels | None = None,
) -> float:
    """Encode the training and the held-out samples of a data set into `out/train` and `out/holdout`.

    With `flip` the training samples are encoded mirrored too; without `stores_latents` only captions are.
    Returns the FLOPs of the text encoder, in all attempts.
    Says before it starts how much they will take, and afterwards how many captions were cut. Raises `Preempted`; the
    next attempt continues with the shards that are not finished. Workers of a group divide the shards, and rank 0
    writes `out`. Other processes of the workspace's engine load codec and text encoder with `open_models`.
    """
    total, group = sum(read_index(dataset / name).count for name in ("train", "holdout")), DataParallelGroup.join()
    encoding = _Encoding(
        open_models=open_models or (lambda: (codec, text)), workspace=workspace, total=total, group=group
    )
    size = _sample_bytes(codec, text, copies=(1 + flip) * stores_latents)
    if group.is_main:
        workspace.notify(
            f"{total:,} samples, at most {size / 2**10:.2f} KiB of latents each, {total * size / 2**20:.1f} MiB in all"
        )
    with group.worker_loss_as_error():
        parts = _encode_both(encoding, dataset, flip=flip, stores_latents=stores_latents)
    if not group.is_main:
        return 0.0
    for part in parts:
        shutil.copytree(part, out / part.parent.name / part.name, copy_function=link_or_copy)
    if text is not None:
        (out / TEXT).mkdir()
        text.save(out / TEXT)
    counts = sum((Counter(read_record(part).get("counts", {})) for part in parts), Counter[str]())
    if num_cut := counts["cut"]:
        workspace.notify(
            f"{num_cut:,} captions, in {total:,} samples, are longer than text.length={text and text.config.length} "
            "tokens, and were cut"
        )
    if saved := counts["saved"]:
        workspace.notify(
            f"captions are kept as text, which saves {saved / total / 2**10:.2f} KiB a sample; every "
            "stage that trains on them encodes them"
        )
    return caption_flops(text) * sum(count_captions(part, as_text=False) for part in parts) if text else 0.0


def _encode_both(encoding: _Encoding, dataset: Path, *, flip: bool, stores_latents: bool) -> list[Path]:
    """Encode training and held-out samples, wait for the other workers of the group, and return all folders."""
    parts, notice = [], None
    try:
        for name in ("train", "holdout"):
            folder = encoding.workspace.scratch / CACHE / "parts" / name
            is_flipped = flip and name == "train"
            parts += encoding.encode_shards(dataset / name, folder, flip=is_flipped, stores_latents=stores_latents)
    except Preempted as error:
        notice = error
    if encoding.group.any_rank(notice is not None):
        raise notice or Preempted("another worker was stopped; run the same command again to continue")
    return parts


def count_captions(folder: Path, *, as_text: bool) -> int:
    """Return the captions of latents that are encoded, or those that are kept as text."""
    captions = read_latents(folder).captions
    return len(captions.weight) if captions is not None and captions.are_texts == as_text else 0


def caption_flops(text: TextEncoder) -> float:
    """Return the FLOPs of encoding one caption, which each costs alike, since all have one length."""
    return forward_flops(lambda: text.encode_padded([""]))


def text_flops(folders: Sequence[Path]) -> float:
    """Return the FLOPs of encoding the captions that latents keep as text, which `encode_latents` does."""
    counts = {folder: count_captions(folder, as_text=True) for folder in folders if has_latents(folder)}
    folder = next((folder for folder, count in counts.items() if count), None)
    encoder = None if folder is None else TextEncoder.from_config(_text_config(folder))
    return 0.0 if encoder is None else caption_flops(encoder) * sum(counts.values())


def encode_folder(shards: Path, codec: FrozenCodec, text: TextEncoder | None, out: Path, workspace: Workspace) -> int:
    """Encode a folder of shards into folders below `out`, and return the number of samples; raises `Preempted`."""
    total = read_index(shards).count
    encoding = _Encoding(open_models=lambda: (codec, text), workspace=workspace, total=total)
    for part in encoding.encode_shards(shards, workspace.scratch / CACHE / "parts" / out.name):
        shutil.copytree(part, out / part.name, copy_function=link_or_copy)
    return total


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
            for block in _batches(read_identities(shards), MATCH_ROWS):
                wanted = np.array([sample_id for _, sample_id in block])
                found = order[np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)]
                if (unknown := np.flatnonzero(ids[found] != wanted)).size:
                    raise LatentError(
                        f"sample {block[unknown[0]][0]!r} of {shards} has no latents in {parts}; they were encoded "
                        "from other data: encode this data set again"
                    )
                for run in np.split(found, np.flatnonzero(np.diff(np.searchsorted(starts, found, "right"))) + 1):
                    part = int(np.searchsorted(starts, run[0], "right")) - 1
                    writer.add(latents[part].select(torch.from_numpy(run - starts[part])))
        if are_streamed(folders):
            shutil.copytree(shards, out / str(k) / IMAGES, copy_function=link_or_copy)


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


def read_class_names(folder: Path) -> tuple[str, ...]:
    """Return the names of the classes of a folder of latents or of shards."""
    return tuple(read_record(folder)["class_names"]) if has_latents(folder) else read_index(folder).class_names


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
    encoding = _Encoding(open_models=lambda: (frozen, text), workspace=workspace, total=total)
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
    text = TextEncoder.from_config(_text_config(folder))
    for block in iter_blocks(latents, ENCODE_BATCH):
        if text is not None and (captions := block.captions) is not None:
            rows, _ = text.encode_and_count(captions.texts())
            counts = captions.first_caption.diff()
            encoded = EncodedCaptions.from_rows(rows, captions.null_text, counts, captions.weight)
            yield replace(block, captions=encoded)


def _text_config(folder: Path) -> TextConfig:
    return from_json(TextConfig, read_record(folder)["origin"]["text"])


def _sample_bytes(codec: FrozenCodec, text: TextEncoder | None, copies: int) -> int:
    """Return the most bytes that one sample takes: latents, class, cluster, hash, and a text of full length."""
    latents = copies * codec.stored_type.itemsize * math.prod(codec.codec.latent_shape) + 24
    if text is None:
        return latents
    if text.config.stored_as == "captions":
        return latents
    return latents + _encoded_bytes(text, [text.config.length]) + 20


def _encoded_bytes(text: TextEncoder, token_counts: Sequence[int]) -> int:
    """Return the bytes of encoded captions of so many tokens, which are cut at the encoder's length."""
    length, width, pooled_width = text.null_text.shape
    return sum(2 * (min(count, length) * width + pooled_width) for count in token_counts)


def _batch_rows(image_shape: tuple[int, int, int]) -> int:
    return max(1, min(ENCODE_BATCH, 2**28 // max(math.prod(image_shape), 1)))


def _batches(samples: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(itertools.islice(samples, size)):
        yield batch


def _sample_ids(latents: LatentDataset) -> np.ndarray:
    if latents.sample_id is None:
        raise LatentError("these latents do not say to which samples they belong; encode the images again")
    return latents.sample_id.numpy()
