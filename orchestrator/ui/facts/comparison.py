"""Two runs side by side: the settings that differ, and the seeds that both have sampled."""

from collections.abc import Iterator, Mapping
from typing import Any

from ddm_core.artifacts import to_jsonable
from orchestrator.config.schema import RunConfig
from orchestrator.ui.facts.samples import SampleFile

SHOWN_SEEDS = 35

ABSENT = "–"


def list_differences(left: RunConfig, right: RunConfig) -> list[tuple[str, str, str]]:
    """Return name and both values of every setting that differs, without name and folder of the run."""
    ours, theirs = (dict(_flatten(to_jsonable(config))) for config in (left, right))
    names = [*ours, *(name for name in theirs if name not in ours)]
    pairs = [(name, ours.get(name, ABSENT), theirs.get(name, ABSENT)) for name in names]
    return [pair for pair in pairs if pair[1] != pair[2] and pair[0] not in ("name", "folder")]


def common_seeds(left: SampleFile, right: SampleFile) -> dict[int, tuple[int, int]]:
    """Return the first seeds that both have, each with its place in both."""
    theirs = {seed: place for place, seed in reversed(list(enumerate(right.seeds)))}
    found: dict[int, tuple[int, int]] = {}
    for place, seed in enumerate(left.seeds):
        if seed in theirs and len(found) < SHOWN_SEEDS:
            found.setdefault(seed, (place, theirs[seed]))
    return found


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every leaf of nested mappings as a dotted name and its text."""
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flatten(item, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, "null" if value is None else str(value)
