"""The index of a tree, which says what the tree consists of; and which names may be used in a storage at all.

A storage may be hostile: an index is believed only if it is, byte for byte, what `render` makes of its content, and
none of its paths leaves the folder.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from orchestrator.islands.storage.errors import CorruptTransfer, StorageError

INDEX = ".tree.json"
"""Name of the index inside its tree; it is written last."""


class Entry(NamedTuple):
    """One file of a tree."""

    sha256: str
    bytes: int


Index = dict[str, Entry]
"""Files by their path inside the tree."""


def render(index: Mapping[str, Entry]) -> bytes:
    """The index as it is stored, with a checksum over all of it."""
    files = {path: entry._asdict() for path, entry in index.items()}
    digest = hashlib.sha256(_canonical(files)).hexdigest()
    return _canonical({"files": files, "sha256": digest})


def parse(data: bytes, where: str) -> Index:
    """The index that `data` holds; raises `CorruptTransfer` for a changed one, `StorageError` for a hostile one."""
    try:
        found = json.loads(data)["files"]
        index = {path: Entry(**entry) for path, entry in found.items()}
        intact = render(index) == data and all(_is_entry(entry) for entry in index.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptTransfer(f"{where} is no index of a tree ({error}); send the folder again") from error
    if not intact:
        raise CorruptTransfer(f"{where} differs from its own checksum; send the folder again")
    for path in index:
        checked_path(path)
        if folders := [str(parent) for parent in PurePosixPath(path).parents if str(parent) in index]:
            raise StorageError(f"{where} calls {folders[0]!r} both a file and a folder; it was not written by us")
    return index


def checked_path(path: str) -> str:
    """A path inside a tree; raises `StorageError` if it could leave its folder or hide in a listing."""
    parts = path.split("/")
    printable = path.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in path)
    if not printable or "\\" in path or any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in path):
        raise StorageError(f"file names hold no backslash and no control character, not {path!r}; rename the file")
    if any(part in ("", ".", "..") for part in parts):
        raise StorageError(f"a file lies below its tree, at a relative path, not {path!r}; do not use this storage")
    return path


def checked_name(name: str) -> str:
    """The name of a tree or a file in a storage; raises `StorageError` if it is not plain."""
    parts = name.split("/")
    if any(not re.fullmatch(r"[\w.=,+@-]+", part) or part in (".", "..", INDEX) for part in parts):
        raise StorageError(
            f"a name in a storage is made of letters, digits and `_.=,+@-`, with slashes between, not {name!r}"
        )
    return name


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _is_entry(entry: Entry) -> bool:
    return bool(re.fullmatch(r"[0-9a-f]{64}", entry.sha256)) and type(entry.bytes) is int and entry.bytes >= 0
