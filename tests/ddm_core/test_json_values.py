"""Dataclasses from JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pytest

from ddm_core.artifacts import CorruptArtifact, UnfinishedArtifact, to_jsonable, write_json, write_record
from ddm_core.json_values import from_json, read_record


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


def test_record_names_every_flipped_bit_and_cut(tmp_path):
    path = tmp_path / "value.json"
    write_record(path, VALUE)
    content = path.read_bytes()
    assert read_record(Outer, path) == VALUE
    flipped = (
        content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]
        for place in range(len(content))
        for bit in range(8)
    )
    for damaged in [*flipped, *(content[:size] for size in range(len(content)))]:
        path.write_bytes(damaged)
        try:
            value = read_record(Outer, path)
        except CorruptArtifact as error:
            assert path.name in str(error)
        else:
            assert value == VALUE  # the name of the checksum itself is damaged


def test_record_of_an_earlier_version_has_no_checksum(tmp_path):
    write_json(tmp_path / "value.json", VALUE)
    assert read_record(Outer, tmp_path / "value.json") == VALUE
    with pytest.raises(UnfinishedArtifact):
        read_record(Outer, tmp_path / "absent.json")


@pytest.mark.parametrize("value", [7, [], {"shape": "x", "steps": {}}, {"shape": [], "steps": {}, "share": "much"}])
def test_record_of_another_shape_is_refused(tmp_path, value):
    write_json(tmp_path / "value.json", value)
    with pytest.raises(CorruptArtifact, match="value.json is damaged"):
        read_record(Outer, tmp_path / "value.json")
