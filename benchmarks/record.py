"""Results of a benchmark as JSON: the machine, the claims and the measured values."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ddm_core.artifacts import write_json
from orchestrator.controller import project_commit

RESULTS = Path(__file__).parents[1] / "docs" / "benchmarks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One row of the claims table. Field names are the JSON keys."""

    name: str
    bar: str
    """The target that the measured value must meet."""
    value: str
    spread: str
    holds: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A table of details below the claims."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]] = field(default_factory=list)


def describe_machine() -> str:
    """Return processor, vector instructions, number of cores and versions in one line."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    processor = f"{processor} ({torch.backends.cpu.get_cpu_capability()})"
    return f"{processor}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"


def write_result(
    script: str,
    seconds: float,
    claims: Sequence[Claim],
    listings: Sequence[Listing] = (),
    notes: Sequence[str] = (),
    figures: Mapping[str, float] | None = None,
    *,
    machine: str | None = None,
    commit: str | None = None,
) -> dict[str, Any]:
    """Write `docs/benchmarks/<script>.json` and return its content; other benchmarks read `figures`.

    `machine` and `commit` default to this machine and the current commit.
    """
    result = {
        "machine": machine or describe_machine(),
        "commit": commit or project_commit(),
        "seconds": round(seconds, 1),
        "claims": list(claims),
        "listings": list(listings),
        "notes": list(notes),
        "figures": dict(figures or {}),
    }
    write_json(RESULTS / f"{script}.json", result)
    return result


def median_and_range(values: Sequence[float], digits: int = 3) -> tuple[str, str]:
    """Return the median, and the smallest and largest value, as text."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return f"{median:.{digits}f}", f"{ordered[0]:.{digits}f} to {ordered[-1]:.{digits}f}, n = {len(ordered)}"
