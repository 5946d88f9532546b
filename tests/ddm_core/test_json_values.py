"""Dataclasses from JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pytest

from ddm_core.artifacts import to_jsonable
from ddm_core.json_values import from_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """One nested value."""

    bits: Literal[4, 8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    """A value with every kind of field."""

    shape: tuple[int, ...]
    steps: Mapping[str, tuple[int, ...]]
    inner: Inner | None = None
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.share > 1:
            raise ValueError("share must be at most 1")


VALUE = Outer(shape=(2, 3), steps={"a": (0, 1)}, inner=Inner(bits=8), share=1.0)


def test_json_round_trip_preserves_the_value():
    assert from_json(Outer, json.loads(json.dumps(to_jsonable(VALUE)))) == VALUE


def test_missing_fields_take_their_defaults():
    assert from_json(Outer, {"shape": [2], "steps": {}}) == Outer(shape=(2,), steps={})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": ["x"]}, r"Outer\.shape\.0: .*integer.*; got 'x'"),
        ({"steps": None}, r"Outer\.steps: "),
        ({"inner": {"bits": 7}}, r"Outer\.inner\.bits: Input should be 4 or 8; got 7"),
        ({"share": 2}, "Outer: share must be at most 1"),
    ],
)
def test_invalid_field_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        from_json(Outer, to_jsonable(VALUE) | change)


@pytest.mark.parametrize("value", [[], None, "text"])
def test_anything_but_an_object_is_refused(value):
    with pytest.raises(ValueError, match="Outer must be a JSON object"):
        from_json(Outer, value)
