"""Latents on the disk: a file of raw numbers for each array, and a record of their types, origin and checksums.

folder/latents.json     samples, class names, origin, and type, shape and SHA-256 of every array
folder/clean.bin …      the arrays, appended to block by block, read as memory maps
"""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from data_partition.shards.join import join_shards
from data_partition.shards.shards import read_index
from ddm_core.artifacts import ArtifactError, CorruptArtifact, read_with_checksum, to_jsonable, write_record
from ddm_core.files.checksums import checksum
from experts.codec import Codec
from experts.conditions.captions import EncodedCaptions
from experts.conditions.text_embedding import TextEmbedding
from experts.training.latent_dataset import LatentDataset, LatentError
from experts.training.streaming.image_stream import IMAGES, ImageStream

log = logging.getLogger(__name__)

RECORD = "latents.json"
STREAMED = "streamed"
"""In the origin of latents: only classes and captions are stored."""
TYPES = ("float16", "float32", "int64", "bool", "uint8")
BLOCK_BYTES = 2**26
_SAMPLES = ("clean", "class_id", "cluster_id", "sample_id", "bucket_id", "flipped")
_CAPTIONS = ("token_features", "pooled", "weight", "caption_tokens", "sample_captions")
_NULL = ("sequence", "mask", "pooled")


class LatentWriter:
    """Appends latents to a folder; a folder whose block ended with an error has no record and is unfinished."""

    def __init__(self, folder: Path, class_names: Iterable[str] = (), origin: Mapping[str, Any] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.class_names, self.origin = folder, tuple(class_names), dict(origin or {})
        self._files: dict[str, BinaryIO] = {}
        self._digests: dict[str, Any] = {}
        self._arrays: dict[str, dict[str, Any]] = {}
        self._shapes: tuple[tuple[int, ...], ...] = ()
        self.counts: Counter[str] = Counter()
        """Further numbers for the record."""

    def __enter__(self) -> "LatentWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        if error is None:
            arrays = {
                name: entry | {"checksum": self._digests[name].hexdigest()} for name, entry in self._arrays.items()
            }
            record = {"class_names": self.class_names, "origin": self.origin, "arrays": arrays}
            optional = {"shapes": self._shapes, "counts": dict(self.counts)}
            write_record(self.folder / RECORD, record | {name: value for name, value in optional.items() if value})

    def add(self, dataset: LatentDataset) -> None:
        """Append samples; the first call, which may have none, gives the types and shapes of all.

        Raises `LatentError` for latents of other shapes.
        """
        if not self._files:
            self._shapes = dataset.shapes
        if dataset.shapes != self._shapes:
            raise LatentError(
                f"latents of shapes {dataset.shapes} and {self._shapes} cannot be joined; encode both with the same "
                "data.image_size and data.aspect_buckets"
            )
        arrays = {name: getattr(dataset, name) for name in _SAMPLES if getattr(dataset, name) is not None}
        if (captions := dataset.captions) is not None:
            lengths = (captions.first_token.diff(), captions.first_caption.diff())
            values = (captions.token_features, captions.pooled, captions.weight, *lengths)
            arrays |= dict(zip(_CAPTIONS, values, strict=True))
            if not self._files:
                arrays |= {f"null_{name}": getattr(captions.null_text, name) for name in _NULL}
        for name, tensor in arrays.items():
            self._append(name, tensor.numpy())

    def _append(self, name: str, rows: np.ndarray) -> None:
        if name not in self._files:
            self._files[name] = (self.folder / f"{name}.bin").open("wb")
            self._digests[name] = hashlib.sha256()
            self._arrays[name] = {"dtype": str(rows.dtype), "shape": [0, *rows.shape[1:]]}
        data = rows.tobytes()
        self._files[name].write(data)
        self._digests[name].update(data)
        self._arrays[name]["shape"][0] += len(rows)


def read_latents(folder: Path) -> LatentDataset:
    """Open latents as memory maps; raises an `ArtifactError` if the record is missing, or does not fit its files."""
    record = read_record(folder)
    arrays = {name: _open(folder / f"{name}.bin", entry) for name, entry in record["arrays"].items()}
    try:
        samples = {name: arrays[name] for name in _SAMPLES if name in arrays}
        captions = _read_captions(arrays) if "token_features" in arrays else None
        shapes = tuple(map(tuple, record.get("shapes", ())))
        return LatentDataset(**samples, captions=captions, shapes=shapes, images=None)
    except (KeyError, TypeError) as error:
        raise CorruptArtifact(f"{folder} lacks an array of latents ({error}); encode the images again") from error


def read_record(folder: Path) -> dict[str, Any]:
    """Read the record of latents; raises an `ArtifactError`."""
    record = read_with_checksum(folder / RECORD)
    if not {"class_names", "origin", "arrays"} <= set(record):
        raise CorruptArtifact(f"{folder / RECORD} is not a record of latents; encode the images again")
    return record


def has_latents(folder: Path) -> bool:
    """Return whether a folder holds finished latents."""
    return (folder / RECORD).is_file()


def keeps_texts(folder: Path) -> bool:
    """Return whether the captions of a folder of latents are not encoded."""
    return bool(read_record(folder)["arrays"].get("token_features", {}).get("dtype") == "uint8")


def are_streamed(folders: Sequence[Path]) -> bool:
    """Return whether folders of samples have no latents, since their images are encoded when they are needed.

    Raises `LatentError` if only some do.
    """
    kinds = {has_latents(folder) and read_record(folder)["origin"].get("images") == STREAMED for folder in folders}
    if len(kinds) > 1:
        raise LatentError("some folders have latents and others read their images; encode all of them in one way")
    return True in kinds


def with_images(dataset: LatentDataset, folders: Sequence[Path], codec: Codec) -> LatentDataset:
    """Return the samples of folders, with their images if these are encoded when they are needed."""
    if not are_streamed(folders):
        return dataset
    return replace(dataset, images=ImageStream(codec, [folder / IMAGES for folder in folders]))


def join_latents(folders: Sequence[Path], out: Path) -> None:
    """Write the latents of some folders into one, in their order, with their offset indices if they have some.

    Raises `LatentError` if codec, texts or classes differ.
    """
    records = [read_record(folder) for folder in folders]
    if any(
        (record["origin"], record["class_names"]) != (records[0]["origin"], records[0]["class_names"])
        for record in records
    ):
        raise LatentError(
            f"{', '.join(map(str, folders))} have another codec, text encoder or classes; encode them again"
        )
    with LatentWriter(out, records[0]["class_names"], records[0]["origin"]) as writer:
        for folder in folders:
            check_latents(folder)
            for block in iter_blocks(read_latents(folder)):
                writer.add(block)
    if are_streamed(folders):
        join_shards([folder / IMAGES for folder in folders], out / IMAGES)


def check_latents(folder: Path) -> None:
    """Raise an `ArtifactError` if an array differs from its checksum."""
    for name, entry in read_record(folder)["arrays"].items():
        if checksum(folder / f"{name}.bin") != entry["checksum"]:
            raise CorruptArtifact(f"{folder / name}.bin does not match its checksum; encode the images again")


def is_reusable(folder: Path, origin: Mapping[str, Any]) -> bool:
    """Return whether latents are of this origin and as they were written; log the reason if they are damaged."""
    if not has_latents(folder):
        return False
    try:
        if read_record(folder)["origin"] != to_jsonable(origin):
            return False
        check_latents(folder)
    except (ArtifactError, OSError) as error:
        log.warning("%s; encoding again", error)
        return False
    return True


def iter_blocks(dataset: LatentDataset, max_rows: int | None = None) -> Iterator[LatentDataset]:
    """Yield the samples in blocks of `BLOCK_BYTES` of latents; one block without samples if there are none."""
    rows = max(1, BLOCK_BYTES // max(4 * math.prod(dataset.latent_shape), 1))
    rows = min(rows, max_rows or rows)
    for start in range(0, max(len(dataset), 1), rows):
        yield dataset.select(torch.arange(start, min(start + rows, len(dataset))))


def _open(path: Path, entry: dict[str, Any]) -> Tensor:
    """Map one array; raises `CorruptArtifact` if its file is missing or has another size."""
    try:
        dtype, shape = np.dtype(TYPES[TYPES.index(entry["dtype"])]), tuple(map(int, entry["shape"]))
        if path.stat().st_size != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"it has not the size of {shape}")
        array = np.memmap(path, dtype, "c", shape=shape) if math.prod(shape) else np.zeros(shape, dtype)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise CorruptArtifact(f"{path} is not an array of latents ({error}); encode the images again") from error
    return torch.from_numpy(array)


def _read_captions(arrays: Mapping[str, Tensor]) -> EncodedCaptions:
    null = [arrays[f"null_{name}"] for name in _NULL]
    first_token, first_caption = (
        torch.cat([torch.zeros(1, dtype=torch.int64), arrays[name].cumsum(0)])
        for name in ("caption_tokens", "sample_captions")
    )
    return EncodedCaptions(
        token_features=arrays["token_features"],
        first_token=first_token,
        pooled=arrays["pooled"],
        weight=arrays["weight"],
        first_caption=first_caption,
        null_text=TextEmbedding(null[0], null[1], null[2], torch.ones(1, dtype=torch.bool)),
    )


def read_class_names(folder: Path) -> tuple[str, ...]:
    """Return the names of the classes of a folder of latents or of shards."""
    return tuple(read_record(folder)["class_names"]) if has_latents(folder) else read_index(folder).class_names
