"""Encode the samples of one shard: their latents, and the texts of their captions.

A sample is known by a hash of its key and its files: latents of a renamed or changed sample belong to no other.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

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
from ddm_core.artifacts import atomic_folder, list_files
from ddm_core.files.checksums import checksum
from experts.codec import Codec, encoder_folder
from experts.conditions.captions import EncodedCaptions
from experts.conditions.condition import NULL_CLASS
from experts.conditions.text_encoder import TextEncoder
from experts.training.latent_dataset import LatentDataset
from experts.training.latents.folder import (
    STREAMED,
    LatentWriter,
    is_reusable,
)
from experts.types import Images, Latents

ENCODE_BATCH = 512
"""Samples that are encoded at a time, at most."""
MATCH_ROWS = 4096
"""Samples whose identities are looked up at a time."""


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
class ShardEncoder:
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
        rows = _batch_rows(self.index.image_shape)
        while block := list(itertools.islice(samples, rows)):
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
            self.counts["saved"] += encoded_bytes(text, tokens) - len(kept.token_features)
            return kept
        rows, num_cut = text.encode_and_count(texts)
        self.counts["cut"] += num_cut
        return EncodedCaptions.from_rows(rows, text.null_text, counts, weights)


def _batch_rows(image_shape: tuple[int, int, int]) -> int:
    return max(1, min(ENCODE_BATCH, 2**28 // max(math.prod(image_shape), 1)))


def encoded_bytes(text: TextEncoder, token_counts: Sequence[int]) -> int:
    """Return the bytes of encoded captions of so many tokens, which are cut at the encoder's length."""
    length, width, pooled_width = text.null_text.shape
    return sum(2 * (min(count, length) * width + pooled_width) for count in token_counts)


def part_folder(out: Path, shard: int) -> Path:
    """Return the folder of the latents of a shard."""
    return out / f"{shard:05d}"
