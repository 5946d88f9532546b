"""Images in Parquet files, as a saved Hugging Face data set has them: bytes, a caption and a class in each row."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_partition.config import DataConfig
from data_partition.datasets.captions import KEYS, open_parquet, pick_captions
from data_partition.datasets.source import Unreadable
from data_partition.datasets.webdataset_source import read_class
from data_partition.errors import InvalidCaptions, ShardError, SourceMissing, UnreadableImage
from data_partition.shards.decoded_images import IMAGES
from data_partition.shards.shards import Sample
from data_partition.shards.tar import MAX_SAMPLE_BYTES, quote_key
from data_partition.shards.untrusted import is_printable, make_printable

ROWS = 64
"""Rows that are read at a time."""


def list_parquet(path: str | None) -> list[Path]:
    """Return the Parquet files at or below a path, in order; raises `SourceMissing` if there are none."""
    root = Path(path or "")
    files = [root] if root.is_file() else sorted(root.rglob("*.parquet"))
    if not files:
        raise SourceMissing(f"data.path={path} is no Parquet file, and no folder with one; correct data.path")
    return files


def list_rows(path: str | None) -> Iterator[tuple[str, None]]:
    """Yield the key of every row; its class is not known without reading it. Raises like `read_parquet`."""
    for number, file in enumerate(list_parquet(path)):
        table = _open(file)
        _find_image_column(file, table.schema_arrow)
        yield from ((make_row_key(number, file, row), None) for row in range(table.metadata.num_rows))


def check_caption_column(config: DataConfig) -> None:
    """Raise `InvalidCaptions` if no file has a column of captions; raises like `read_parquet` too."""
    columns = sorted({name for file in list_parquet(config.path) for name in _open(file).schema_arrow.names})
    wanted = (*([config.caption_key] if config.caption_key else KEYS), *(config.more_captions or ()))
    if not set(wanted) & set(columns):
        raise InvalidCaptions(
            f"data.captions=true, and the Parquet files of data.path={config.shown_path} have no column "
            f"{' or '.join(wanted)}; they have {', '.join(map(make_printable, columns))}: name one with "
            "data.caption_key, or set data.captions=false"
        )


def make_row_key(number: int, file: Path, row: int) -> str:
    """Return the key of a row, unique among all files."""
    return quote_key(f"{number:05d}-{file.stem}/{row:08d}")


def read_class_list(path: str | None) -> tuple[str, ...]:
    """Return the names of the classes that the first file records, empty if it records none."""
    metadata = _open(list_parquet(path)[0]).schema_arrow.metadata or {}
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        names = tuple(features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return ()
    return names if all(isinstance(name, str) and is_printable(name) for name in names) else ()


def read_parquet_file(config: DataConfig, numbered: tuple[int, Path]) -> Iterator[Sample | Unreadable]:
    """Yield every row of a file, with its number in the keys, whichever split it is named after.

    Raises `ShardError`.
    """
    number, file = numbered
    table = _open(file)
    image = _find_image_column(file, table.schema_arrow)
    try:
        rows = (row for batch in table.iter_batches(ROWS) for row in batch.to_pylist())
        for row, fields in enumerate(rows):
            yield _read_row(make_row_key(number, file, row), f"{file.name}: row {row}", fields, image, config)
    except (ValueError, OSError) as error:
        raise ShardError(f"{file} is damaged: {error}; download it again") from error


def _open(file: Path) -> Any:
    try:
        return open_parquet(file)
    except (ValueError, OSError) as error:
        raise ShardError(f"{file} is not a readable Parquet file: {error}; download it again") from error


def _find_image_column(file: Path, schema: Any) -> str:
    """Return the column of images: bytes, or a structure with a field `bytes`; raises `SourceMissing`."""
    kinds = {field.name: str(field.type) for field in schema}
    found = [name for name, kind in kinds.items() if "binary" in kind and (kind[0] != "s" or "bytes: " in kind)]
    if not found:
        raise SourceMissing(
            f"{file} has no column with the bytes of images; it has "
            f"{', '.join(make_printable(f'{name} ({kind})') for name, kind in kinds.items())}: save the data set with "
            "its images inside"
        )
    return next((name for name in ("image", "img") if name in found), found[0])


def _read_row(key: str, name: str, fields: Mapping[str, Any], image: str, config: DataConfig) -> Sample | Unreadable:
    data = fields[image].get("bytes") if isinstance(fields[image], dict) else fields[image]
    try:
        if data is None or len(data) > MAX_SAMPLE_BYTES:
            raise UnreadableImage(
                "it has no bytes of an image" if data is None else f"it has more than {MAX_SAMPLE_BYTES} bytes"
            )
        decoded = IMAGES.decode(data)
        label, class_name = read_class({}, dict(fields)) if config.labels else (-1, "")
        caption, more = pick_captions(fields, config) if config.captions else ("", ())
    except (UnreadableImage, ValueError) as error:
        return Unreadable(key=key, reason=make_printable(str(error)), name=name)
    return Sample(
        key=key,
        image=decoded.pixels,
        label=label,
        class_name=class_name,
        caption=caption,
        more_captions=more,
        name=name,
        remarks=decoded.remarks,
        source=(decoded.extension, data) if decoded.extension else None,
    )
