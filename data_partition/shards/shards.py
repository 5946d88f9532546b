"""Samples in shards: a folder of tars of images, and an `index.json` with their contents and checksums.

    folder/shard-00000.tar     <key>.png (or .jpg, .webp, .avif, the source's own file), with <key>.cls if it has a
                               class and <key>.txt if it has a caption, <key>.json if it has more
    folder/index.json          sample count, image shape, class names, tars and their checksums

With `data.mode=stream` there are no tars: the folder has an offset index of those of the user (`offset_index.py`), and
all functions here read the samples from there, and give what a copy would give.

The images of a tar have one shape. A folder of several shapes is read as images of the first one, the square, except by
`read_encoded`.

The same samples always give the same bytes. A tar is verified against its checksum each time it is opened, and the
index carries its own checksum. So a changed bit anywhere is an error, also in a copy of the folder.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import Int64, UInt8

from data_partition.config import DataConfig
from data_partition.errors import ShardError, UnreadableImage
from data_partition.shards.decoded_images import IMAGES
from data_partition.shards.images import STORED, crop_to, encode_png, fit_image
from data_partition.shards.offset_index import ImagePlace, OffsetIndex, SourceTar
from data_partition.shards.tar import Encoded, TarWriter, read_tar
from ddm_core.artifacts import (
    CorruptArtifact,
    UnfinishedArtifact,
    read_with_checksum,
    to_jsonable,
    write_record,
)
from ddm_core.files.checksums import checksum
from ddm_core.json_values import from_json

INDEX = "index.json"


Shape = tuple[int, int, int]
"""Height, width, channels."""

MoreCaptions = tuple[tuple[str, float], ...]
"""Further captions of one sample, each with how often it is used for once of the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image with its class and caption."""

    key: str
    image: UInt8[np.ndarray, "height width channel"]
    label: int = -1
    """-1: no class, or one with a `class_name`."""
    class_name: str = ""
    """The class as a word, if its source has no numbers; never stored."""
    caption: str = ""
    more_captions: MoreCaptions = ()
    name: str = ""
    """Its path as a person knows it; empty: the key. Never stored."""
    remarks: tuple[str, ...] = ()
    """What was converted or left out while it was read; never stored."""
    source: tuple[str, bytes] | None = None
    """Extension and content of the file that `image` was decoded from, if shards may store it as it is."""
    place: ImagePlace | None = None
    """Where it is in a tar of the user, with `data.mode=stream`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBatch:
    """Images of one shape, with their keys, classes (-1: none) and captions (empty: none)."""

    keys: list[str]
    images: UInt8[np.ndarray, "batch height width channel"]
    labels: Int64[np.ndarray, " batch"]
    captions: list[str]
    more_captions: list[MoreCaptions]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSource:
    """Tars of the user that samples stay in, one for each shard, and how they are read."""

    tars: tuple[SourceTar, ...]
    config: DataConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex:
    """Contents of a folder of shards."""

    count: int
    image_shape: Shape
    """Zeros in an empty folder without a configured shape."""
    class_names: tuple[str, ...]
    """Empty: the samples have no classes."""
    shards: tuple[str, ...]
    shard_counts: tuple[int, ...]
    """Samples in each shard."""
    checksums: tuple[str, ...]
    """SHA-256 of each shard."""
    buckets: tuple[Shape, ...] = ()
    """Further shapes that images may have."""
    shard_buckets: tuple[int, ...] = ()
    """Position of each shard's shape in `image_shapes`; empty: all have `image_shape`."""
    source: StreamSource | None = None
    """None: the shards are tars of this folder."""

    @property
    def image_shapes(self) -> tuple[Shape, ...]:
        """Return all shapes, the square first."""
        return self.image_shape, *self.buckets

    @property
    def row_shapes(self) -> Iterator[Shape]:
        """Yield the image shape of every sample."""
        for number, count in enumerate(self.shard_counts):
            yield from [self.image_shapes[self.bucket_of(number)]] * count

    def bucket_of(self, shard: int) -> int:
        """Return the position of a shard's shape in `image_shapes`."""
        return self.shard_buckets[shard] if self.shard_buckets else 0


class ShardWriter:
    """Writer of numbered shards; `close` writes the index, and a folder without an index is unfinished.

    As a context manager it only closes its file when the block ends with an error.
    """

    def __init__(
        self,
        folder: Path,
        samples_per_shard: int = 2048,
        class_names: tuple[str, ...] = (),
        image_shape: Shape = (0, 0, 0),
        buckets: tuple[Shape, ...] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.samples_per_shard = samples_per_shard
        self.class_names = class_names
        self.image_shape = image_shape
        self.buckets = buckets
        self.shard_counts: list[int] = []
        self.shard_buckets: list[int] = []
        self._tars: dict[int, tuple[int, TarWriter]] = {}
        """Number and file of the shard that images of each shape go into."""

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            with contextlib.suppress(OSError):
                self._close_tars()

    @property
    def count(self) -> int:
        """Return the number of samples written so far."""
        return sum(self.shard_counts)

    def add(self, sample: Sample) -> None:
        """Append one sample; raises `ValueError` if its image has a shape that the shards have not."""
        shape = sample.image.shape
        if self.image_shape == (0, 0, 0):
            self.image_shape = (shape[0], shape[1], shape[2])
        if shape not in (self.image_shape, *self.buckets):
            shapes = " or ".join(map(str, (self.image_shape, *self.buckets)))
            raise ValueError(f"{sample.key} has shape {shape}, the shards have {shapes}; resize it first")
        self.add_encoded(encode_sample(sample), shape)

    def add_encoded(self, sample: Encoded, shape: tuple[int, ...] | None = None) -> None:
        """Append a sample from `read_encoded`; the shape of its image, None for the first one, is not checked."""
        bucket = 0 if shape is None else (self.image_shape, *self.buckets).index(shape)
        number, tar = self._tars.get(bucket, (-1, None))
        if tar is None or self.shard_counts[number] == self.samples_per_shard:
            if tar is not None:
                tar.close()
            number = len(self.shard_counts)
            tar = TarWriter(self.folder / shard_name(number))
            self._tars[bucket] = number, tar
            self.shard_counts.append(0)
            self.shard_buckets.append(bucket)
        tar.add(sample)
        self.shard_counts[number] += 1

    def close(self) -> ShardIndex:
        """Finish the last shards and write the index."""
        self._close_tars()
        shards = tuple(shard_name(number) for number in range(len(self.shard_counts)))
        index = ShardIndex(
            count=self.count,
            image_shape=self.image_shape,
            class_names=self.class_names,
            shards=shards,
            shard_counts=tuple(self.shard_counts),
            checksums=tuple(checksum(self.folder / name) for name in shards),
            buckets=self.buckets,
            shard_buckets=tuple(self.shard_buckets) if self.buckets else (),
        )
        write_index(self.folder, index)
        return index

    def _close_tars(self) -> None:
        tars, self._tars = self._tars, {}
        for _, tar in tars.values():
            tar.close()


def write_index(folder: Path, index: ShardIndex) -> None:
    """Write the index of a folder of tars; without buckets it has no fields for them."""
    omitted = {"source"} if index.buckets else {"source", "buckets", "shard_buckets"}
    content = {name: value for name, value in to_jsonable(index).items() if name not in omitted}
    write_record(folder / INDEX, content)


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}.tar"


def encode_sample(sample: Sample) -> Encoded:
    """Encode a sample as the files of a tar."""
    files = {"png": encode_png(sample.image)} if sample.source is None else dict([sample.source])
    if sample.label >= 0:
        files["cls"] = str(sample.label).encode()
    if sample.caption:
        files["txt"] = sample.caption.encode()
    if sample.more_captions:
        files["json"] = json.dumps({"more_captions": sample.more_captions}).encode()
    return Encoded(key=sample.key, files=files)


def decode_sample(encoded: Encoded, shard: str) -> Sample:
    """Decode a sample that `encode_sample` encoded; raises `ShardError` for other files."""
    try:
        image = IMAGES.decode(next(encoded.files[name] for name in STORED if name in encoded.files)).pixels
        label = decode_label(encoded)
        caption = encoded.files.get("txt", b"").decode()
        more = json.loads(encoded.files.get("json", b"{}")).get("more_captions", [])
        more_captions = tuple((str(text), float(frequency)) for text, frequency in more)
    except (StopIteration, AttributeError, TypeError, ValueError, UnreadableImage) as error:
        raise ShardError(
            f"shard {shard}: sample {encoded.key!r} is corrupt ({error}); make the shards again"
        ) from error
    return Sample(key=encoded.key, image=image, label=label, caption=caption, more_captions=more_captions)


def identify_sample(encoded: Encoded) -> int:
    """Return 64 bits of a hash of a sample's key and files, as a signed number."""
    digest = hashlib.blake2b(encoded.key.encode(), digest_size=8)
    for name, content in sorted(encoded.files.items()):
        digest.update(f"/{name}:{len(content)}/".encode() + content)
    return int.from_bytes(digest.digest(), "big", signed=True)


def decode_label(encoded: Encoded) -> int:
    """Return the class of an encoded sample, -1 if it has none."""
    return int(encoded.files.get("cls", b"-1"))


def read_index(folder: Path) -> ShardIndex:
    """Read the index of `folder`; raises `ShardError` if it is missing, corrupt, or names files outside the folder."""
    try:
        content = read_with_checksum(folder / INDEX)
        height, width, channels = content["image_shape"]
        index = ShardIndex(
            count=content["count"],
            image_shape=(height, width, channels),
            class_names=tuple(content["class_names"]),
            shards=tuple(content["shards"]),
            shard_counts=tuple(content["shard_counts"]),
            checksums=tuple(content["checksums"]),
            buckets=tuple((height, width, channels) for height, width, channels in content.get("buckets", ())),
            shard_buckets=tuple(content.get("shard_buckets", ())),
            source=from_json(StreamSource, content["source"]) if "source" in content else None,
        )
    except (UnfinishedArtifact, CorruptArtifact, KeyError, TypeError, ValueError) as error:
        raise ShardError(f"{folder} is not a folder of shards: {error}; make the shards again") from error
    if index.shards != tuple(shard_name(number) for number in range(len(index.shard_counts))):
        raise ShardError(f"{folder / INDEX} names other files than its shards: {index.shards[:3]}; make them again")
    if len(index.shard_buckets) != (len(index.shards) if index.buckets else 0):
        raise ShardError(f"{folder / INDEX} has not one shape for each shard; make the shards again")
    return index


def read_encoded(folder: Path, start: int = 0) -> Iterator[Encoded]:
    """Yield samples `start`, `start` + 1, … without decoding images; earlier shards are not opened.

    Raises `ShardError`.
    """
    for _, encoded in _read_shards(folder, start):
        yield encoded


def open_offsets(folder: Path) -> tuple[OffsetIndex, DataConfig]:
    """Open the offset index of a folder, and return how its images are read; raises `ShardError` without one."""
    index = read_index(folder)
    if index.source is None:
        raise ShardError(f"{folder} has tars of its own; only data.mode=stream makes an offset index")
    offsets = OffsetIndex(folder, index.source.tars, index.shard_counts, index.checksums, index.shard_buckets)
    return offsets, index.source.config


def read_identities(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield key and `identify_sample` of every sample; an offset index has them."""
    if read_index(folder).source is None:
        yield from ((encoded.key, identify_sample(encoded)) for encoded in read_encoded(folder))
        return
    index, _ = open_offsets(folder)
    yield from ((index.text(row)[0], int(index.rows["sample_id"][row])) for row in range(len(index.rows)))


def read_labels(folder: Path) -> Iterator[int]:
    """Yield the class of every sample, -1 without one; an offset index has them."""
    if read_index(folder).source is None:
        yield from map(decode_label, read_encoded(folder))
    else:
        yield from open_offsets(folder)[0].rows["label"].tolist()


def read_samples(folder: Path, start: int = 0) -> Iterator[Sample]:
    """Yield samples `start`, `start` + 1, … in their order, with images of the first shape; raises `ShardError`."""
    index = read_index(folder)
    height, width, _ = index.image_shape
    samples = (
        (decode_sample(encoded, shard) for shard, encoded in _read_shards(folder, start))
        if index.source is None
        else _read_indexed(folder, start)
    )
    for sample in samples:
        yield replace(sample, image=crop_to(sample.image, height, width)) if index.buckets else sample


def read_without_images(folder: Path, start: int, stop: int) -> ImageBatch:
    """Return the samples of an offset index from `start` to `stop`, with images of no pixels."""
    index, _ = open_offsets(folder)
    texts, labels = [index.text(row) for row in range(start, stop)], index.rows["label"][start:stop]
    return ImageBatch(
        keys=[key for key, _, _ in texts],
        images=np.zeros((stop - start, 0, 0, 0), np.uint8),
        labels=labels.astype(np.int64),
        captions=[caption for _, caption, _ in texts],
        more_captions=[tuple(more) for _, _, more in texts],
    )


def read_batches(folder: Path, batch_size: int, start: int = 0) -> Iterator[ImageBatch]:
    """Yield batches of `batch_size` images from sample `start` on, the last one smaller; raises `ShardError`."""
    batch: list[Sample] = []
    for sample in read_samples(folder, start):
        batch.append(sample)
        if len(batch) == batch_size:
            yield stack_samples(batch)
            batch = []
    if batch:
        yield stack_samples(batch)


def stack_samples(samples: list[Sample]) -> ImageBatch:
    """Stack samples of one shape into a batch."""
    return ImageBatch(
        keys=[sample.key for sample in samples],
        images=np.stack([sample.image for sample in samples]),
        labels=np.array([sample.label for sample in samples], dtype=np.int64),
        captions=[sample.caption for sample in samples],
        more_captions=[sample.more_captions for sample in samples],
    )


def _read_shards(folder: Path, start: int) -> Iterator[tuple[str, Encoded]]:
    index = read_index(folder)
    if index.source is not None:
        yield from ((str(folder), encode_sample(sample)) for sample in _read_indexed(folder, start))
        return
    for name, count, digest in zip(index.shards, index.shard_counts, index.checksums, strict=True):
        if start < count:
            _check_shard(folder / name, digest)
            for number, encoded in enumerate(_read_shard(folder / name, count)):
                if number >= start:
                    yield str(folder / name), encoded
        start = max(start - count, 0)


def _read_indexed(folder: Path, start: int) -> Iterator[Sample]:
    """Yield the samples that an offset index names, as shards would have stored them."""
    index, config = open_offsets(folder)
    for row, data in index.read_in_order(start):
        key, caption, more_captions = index.text(row)
        decoded = IMAGES.decode(data)
        image = fit_image(decoded.pixels, config, key)
        yield Sample(
            key=key,
            image=image,
            label=int(index.rows["label"][row]),
            caption=caption,
            more_captions=tuple(more_captions),
            source=(decoded.extension, data) if decoded.extension and image is decoded.pixels else None,
        )


def _check_shard(path: Path, digest: str) -> None:
    """Raise `ShardError` unless the shard exists and has its checksum."""
    if not path.is_file():
        raise ShardError(f"shard {path} is missing; make the shards again")
    if checksum(path) != digest:
        raise ShardError(f"shard {path} is truncated or corrupt, by its checksum; make the shards again")


def _read_shard(path: Path, count: int) -> Iterator[Encoded]:
    num_samples = 0
    with path.open("rb") as file:
        for encoded in read_tar(file, str(path)):
            num_samples += 1
            yield encoded
    if num_samples != count:
        raise ShardError(f"shard {path} has {num_samples} samples, its index lists {count}; make the shards again")
