"""Dataclasses from JSON: pydantic checks every field, and `__post_init__` checks what types cannot express.

`ddm_core.artifacts.write_json` writes dataclasses; `from_json` is its inverse.
"""

from collections.abc import Hashable, Mapping
from functools import cache
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def from_json(cls: type[T], value: object) -> T:
    """Build a dataclass from a parsed JSON object; raise `ValueError` that names the first invalid field.

    Fields with a default may be missing.
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


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    """Build the validator of a dataclass once."""
    return TypeAdapter(cls)
