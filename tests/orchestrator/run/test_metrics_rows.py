"""Rows of a metrics file, whole and damaged."""

import json
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.run.metrics_rows import parse_row, read_last_row, sample_rows


def rows_of(count: int) -> list[dict]:
    return [{"loss": 1 / step, "step": step} for step in range(10, 10 * count + 10, 10)]


def fresh_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="ddm-rows-")


def write(folder: Path | str, text: bytes) -> Path:
    path = Path(folder) / "metrics.jsonl"
    path.write_bytes(text)
    return path


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@given(count=st.integers(0, 200), points=st.integers(1, 50))
def test_sample_is_rising_and_ends_with_the_last_row(count, points):
    with fresh_folder() as folder:
        rows = rows_of(count)
        sampled = list(sample_rows(write(folder, lines(rows)), points))
    assert all(row in rows for row in sampled) and sampled[-1:] == rows[-1:] and sampled[:1] == rows[:1]
    steps = [row["step"] for row in sampled]
    assert steps == sorted(set(steps)) and len(steps) <= points + 1 and (len(steps) == count or points < 2 * count)


@given(
    count=st.integers(1, 20),
    damage=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_damaged_bytes_cost_their_rows_at_most(count, damage):
    rows = rows_of(count)
    data = bytearray(lines(rows))
    for position, byte in damage:
        data[position % len(data)] = byte
    with fresh_folder() as folder:
        path = write(folder, bytes(data))
        last, sampled = read_last_row(path), list(sample_rows(path, count))
    assert len(sampled) <= count + 1
    assert last is None or last["step"] == parse_row(json.dumps(last))["step"]


@given(st.binary(max_size=400))
def test_any_bytes_can_be_read(data):
    with fresh_folder() as folder:
        path = write(folder, data)
        assert isinstance(read_last_row(path), dict | None)
        assert all(isinstance(row, dict) for row in sample_rows(path, 8))


def test_deep_nesting_is_a_damaged_row():
    assert parse_row("[" * 60_000) is None and parse_row('{"step": NaN}') is None and parse_row('{"step": "1"}') is None


def test_incomplete_last_row_is_left_out(tmp_path):
    path = write(tmp_path, lines(rows_of(3)) + b'{"loss": 0.1, "step": 99')
    assert read_last_row(path)["step"] == 30
