"""Captions beside images: `x.txt` or `x.caption`, or a table `metadata.jsonl|csv|parquet` as Hugging Face has it."""

import csv
import functools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_partition.config import DataConfig
from data_partition.errors import InvalidCaptions, MissingExtra
from data_partition.shards.shards import MoreCaptions
from data_partition.shards.untrusted import CONTROL_CHARACTERS

SIDECARS = (".txt", ".caption")
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"
KEYS = ("caption", "text")
"""Fields that are looked for when no `data.caption_key` is given."""

MAX_ANNOTATION_BYTES = 2**20
"""A class, a caption or a `.json` in a larger file is an error."""

MAX_CAPTION = 10_000
"""A caption of more characters is an error."""


def find_captions(path: Path, root: Path, config: DataConfig) -> tuple[str, MoreCaptions]:
    """Return the captions of an image file below `root`, empty if it has none; a table with the key that is named wins.

    Raises `ValueError` if the caption cannot be used, and `InvalidCaptions` for a table that cannot be read.
    """
    in_table = _find_in_tables(path, root, config) if config.caption_key is not None else ("", ())
    if in_table[0]:
        return in_table
    for sidecar in map(path.with_suffix, SIDECARS):
        if os.path.isfile(sidecar):  # noqa: PTH113 - a name that is too long is no file
            if sidecar.stat().st_size > MAX_ANNOTATION_BYTES:
                raise ValueError(f"its {sidecar.suffix} has more than {MAX_ANNOTATION_BYTES} bytes")
            try:
                return split_captions(sidecar.read_text(encoding="utf-8-sig"))
            except UnicodeDecodeError:
                raise ValueError(f"its caption {sidecar.name!r} is not UTF-8; save it as UTF-8") from None
    return _find_in_tables(path, root, config)


def _find_in_tables(path: Path, root: Path, config: DataConfig) -> tuple[str, MoreCaptions]:
    """Return the captions in the table that is nearest above an image, empty if none names it."""
    for folder in path.parents:
        fields = read_table(folder, config.caption_key).get(path.relative_to(folder).as_posix())
        if fields is not None:
            return pick_captions(fields, config)
        if folder == root:
            break
    return "", ()


def check_captions(images: Iterable[Path], root: Path, config: DataConfig) -> None:
    """Look for a caption of any of these images; raises `InvalidCaptions` if none has one that can be used."""
    read_table.cache_clear()
    paths, fault = list(images), ""
    for path in paths:
        try:
            caption, more = find_captions(path, root, config)
        except ValueError as error:
            fault = fault or f" ({path.relative_to(root).as_posix()!r}: {error})"
        else:
            if caption or more:
                return
    raise InvalidCaptions(
        f"data.captions=true, and none of {len(paths)} images has a caption{fault}: a caption of x.jpg is in x.txt "
        f"beside it, or in a metadata.jsonl, .csv or .parquet with {FILE_NAME} and {' or '.join(KEYS)}; "
        "data.captions=false trains without"
    )


def has_held_out_words(caption: str, held_out: Iterable[str]) -> bool:
    """Return whether a caption has all the words of an entry of `held_out`, in any order; case is ignored."""
    words = set(caption.lower().split())
    return any(words.issuperset(entry.lower().split()) for entry in held_out)


def split_captions(text: str) -> tuple[str, MoreCaptions]:
    """Return a caption a line of the file beside an image, each as likely as the others."""
    captions = [caption for line in re.split(r"[\r\n]+", text) if (caption := normalize_caption(line))]
    return (captions[0] if captions else ""), tuple((caption, 1.0) for caption in captions[1:])


def find_word(caption: str, words: Sequence[str]) -> int:
    """Return the position of the first of these words that a caption has, -1 for none; case is ignored."""
    has = set(caption.lower().split())
    return next((number for number, word in enumerate(words) if word.lower() in has), -1)


def normalize_caption(text: str) -> str:
    """Put the caption on one line, without control characters; raises `ValueError` if it is too long."""
    encodable = text.encode("utf-8", "replace").decode()
    caption = re.sub(r" {2,}", " ", CONTROL_CHARACTERS.sub(" ", encodable)).strip(" ")
    if len(caption) > MAX_CAPTION:
        raise ValueError(f"its caption has {len(caption)} characters, at most {MAX_CAPTION} are read")
    return caption


def pick_captions(fields: Mapping[str, object], config: DataConfig) -> tuple[str, MoreCaptions]:
    """Return all captions among the fields of a sample; raises `ValueError` if one cannot be used."""
    more = [
        (normalize_caption(pick_caption(fields, name)), frequency)
        for name, frequency in (config.more_captions or {}).items()
    ]
    return normalize_caption(pick_caption(fields, config.caption_key)), tuple(each for each in more if each[0])


def pick_caption(fields: Mapping[str, object], key: str | None) -> str:
    """Return the caption among the fields of a sample, empty if it has none; raises `ValueError` if it is no text."""
    name = next((name for name in ([key] if key else KEYS) if fields.get(name) is not None), None)
    if name is None:
        return ""
    if not isinstance(caption := fields[name], str):
        raise ValueError(f"its caption {name!r} is a {type(caption).__name__}, not a text")
    return caption


@functools.lru_cache(maxsize=64)
def read_table(folder: Path, key: str | None) -> dict[str, Mapping[str, object]]:
    """Return the rows of a folder's table by file name, empty without one; raises `InvalidCaptions`."""
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if table is None:
        return {}
    rows: dict[str, Mapping[str, object]] = {}
    try:
        for number, row in enumerate(_read_rows(table), start=1):
            name = row.get(FILE_NAME)
            if not isinstance(name, str) or not any(column in row for column in ([key] if key else KEYS)):
                raise ValueError(
                    f"row {number} has the columns {', '.join(map(str, row))}, but needs {FILE_NAME} and "
                    f"{key or ' or '.join(KEYS)} (data.caption_key names another)"
                )
            pick_caption(row, key)
            rows[name] = row
    except (ValueError, OSError, RecursionError, csv.Error) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise InvalidCaptions(f"{table} cannot be used: {reason}; correct it, or set data.captions=false") from error
    return rows


def _read_rows(table: Path) -> Iterator[Mapping[str, object]]:
    if table.suffix == ".parquet":
        for batch in open_parquet(table).iter_batches():
            yield from batch.to_pylist()
        return
    with table.open(encoding="utf-8-sig", newline="") as file:
        yield from _read_json_lines(file) if table.suffix == ".jsonl" else csv.DictReader(file)


def _read_json_lines(lines: Iterable[str]) -> Iterator[Mapping[str, object]]:
    for line in lines:
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"{line[:50]!r} is not an object")  # noqa: TRY004 - a fault of the file, not of a type
            yield row


def open_parquet(table: Path) -> Any:
    """Open a Parquet file; raises `MissingExtra` without pyarrow, and its `ValueError` or `OSError` for a bad file."""
    try:
        from pyarrow import parquet  # noqa: PLC0415 - a large library that only this format needs
    except ImportError as error:
        raise MissingExtra(f"{table} needs pyarrow; pip install pyarrow") from error
    return parquet.ParquetFile(table)
