"""The index of a tree, which lists the tree's files; and the rules for names in a storage.

A storage may be hostile: an index is accepted only if it is byte-identical to what `render_index` returns for its
content, and if none of its paths leaves the folder.
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


def render_index(index: Mapping[str, Entry]) -> bytes:
    """Return the index as it is stored, with a checksum over all of it."""
    files = {path: entry._asdict() for path, entry in index.items()}
    digest = hashlib.sha256(_canonical_json(files)).hexdigest()
    return _canonical_json({"files": files, "sha256": digest})


def parse_index(data: bytes, description: str) -> Index:
    """Parse a stored index; raise `CorruptTransfer` for a changed one, `StorageError` for a hostile one."""
    try:
        files = json.loads(data)["files"]
        index = {path: Entry(**entry) for path, entry in files.items()}
        is_intact = render_index(index) == data and all(_is_valid(entry) for entry in index.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptTransfer(f"{description} is no index of a tree ({error}); send the folder again") from error
    if not is_intact:
        raise CorruptTransfer(f"{description} differs from its own checksum; send the folder again")
    for path in index:
        validate_path(path)
        if folders := [str(parent) for parent in PurePosixPath(path).parents if str(parent) in index]:
            raise StorageError(
                f"{description} lists {folders[0]!r} as both a file and a folder, so this project did not write it; "
                "do not use this storage"
            )
    return index


def validate_path(path: str) -> str:
    """Return a path inside a tree; raise `StorageError` if it could leave its folder or hide in a listing."""
    is_encodable = path.isascii() or not any("\ud800" <= character <= "\udfff" for character in path)
    has_control = any(ord(character) < 32 or 127 <= ord(character) < 160 for character in path)
    if not is_encodable or "\\" in path or has_control:
        raise StorageError(f"file names hold no backslash and no control character, not {path!r}; rename the file")
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise StorageError(f"a file lies below its tree, at a relative path, not {path!r}; do not use this storage")
    return path


def validate_name(name: str) -> str:
    """Return the name of a tree or a file in a storage; raise `StorageError` if it has other characters than listed."""
    parts = name.split("/")
    if any(not re.fullmatch(r"[\w.=,+@-]+", part) or part in (".", "..", INDEX) for part in parts):
        raise StorageError(
            f"a name in a storage is made of letters, digits and `_.=,+@-`, with slashes between, not {name!r}; "
            "use another name"
        )
    return name


def _canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _is_valid(entry: Entry) -> bool:
    return bool(re.fullmatch(r"[0-9a-f]{64}", entry.sha256)) and type(entry.bytes) is int and entry.bytes >= 0
