"""Dataclasses from JSON: pydantic checks every field, and `__post_init__` checks what types cannot express.

`ddm_core.artifacts.write_json` writes dataclasses; `from_json` is its inverse. A *record* is a small JSON file with its
own checksum.
"""

from collections.abc import Hashable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from ddm_core.artifacts import CHECKSUM_KEY, CorruptArtifact, read_json, read_with_checksum

T = TypeVar("T")


def from_json(cls: type[T], value: object) -> T:
    """Build a dataclass or a typed dictionary from a parsed JSON object.

    Raises `ValueError` that names the first invalid field. Fields with a default may be missing.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{cls.__name__} must be a JSON object; got {type(value).__name__}")
    try:
        instance: T = _adapter(cast(Hashable, cls)).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = "".join(f".{part}" for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{cls.__name__}{field}: {reason}; got {first['input']!r:.100}") from error
    return instance


def read_record(cls: type[T], path: Path) -> T:
    """Read what `artifacts.write_record` wrote.

    Raises `UnfinishedArtifact`, or `CorruptArtifact` for any damage or other shape.

    A file of an earlier version has no checksum; only its shape is checked.
    """
    content = read_json(path)
    if isinstance(content, dict) and CHECKSUM_KEY in content:
        content = read_with_checksum(path)
    try:
        return from_json(cls, content)
    except ValueError as error:
        raise CorruptArtifact(f"{path} is damaged ({error}); delete it and repeat the command") from error


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    """Build the validator of a dataclass once."""
    return TypeAdapter(cls)
