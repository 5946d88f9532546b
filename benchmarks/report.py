"""Claims, tables and pictures from the measurements of several seeds; shared by `compress` and `accelerate`."""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.arms.compress_measurements import Measurements, summarize_origins
from benchmarks.record import RESULTS, Claim, Listing, write_result
from ddm_core.artifacts import to_jsonable

Seeds = Sequence[Measurements]
"""One part's measurements, one dictionary per seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Functions that turn one part's measurements into claims, tables and pictures."""

    claims: Callable[[Seeds], Iterator[Claim]]
    listings: Callable[[Seeds], Iterator[Listing]]
    pictures: Mapping[str, Callable[[Seeds, Path], None]] = field(default_factory=dict)
    """Functions that draw a picture, by file name."""


def write_sections(script: str, sections: Mapping[str, Section], parts: Mapping[str, Seeds], note: str) -> None:
    """Write results and pictures of the measured parts; the note lists the number of seeds of every part."""
    measured = {part: seeds for part, seeds in parts.items() if seeds}
    for part, seeds in measured.items():
        for name, draw_picture in sections[part].pictures.items():
            draw_picture(seeds, RESULTS / name)
    counts = ", ".join(f"{part.replace('_', ' ')} {len(seeds)}" for part, seeds in parts.items())
    seconds, machine, commit = summarize_origins(measured)
    result = write_result(
        script,
        seconds,
        [claim for part, seeds in measured.items() for claim in sections[part].claims(seeds)],
        [listing for part, seeds in measured.items() for listing in sections[part].listings(seeds)],
        [f"Means over seeds; number of seeds per part: {counts}. {note}"],
        machine=machine,
        commit=commit,
    )
    print(json.dumps(to_jsonable(result["claims"]), indent=1))


def mean_claim(name: str, target: str, values: Sequence[float], holds: Callable[[float], bool]) -> Claim:
    """Return a claim on one number per seed; `holds` is applied to the mean."""
    mean = statistics.mean(values)
    return Claim(
        name=name,
        bar=target,
        value=f"{mean:.3f}",
        spread=f"{min(values):.3f} to {max(values):.3f}, n = {len(values)}",
        holds=holds(mean),
    )


def mean_over_seeds(seeds: Seeds, value: Callable[[Measurements], float]) -> float:
    """Return the mean of a number over the seeds."""
    return statistics.mean(value(seed) for seed in seeds)


def format_mean(values: Sequence[float | None]) -> str:
    """Return mean ± standard deviation as text; a dash if no seed has a value."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return f"{statistics.mean(known):.3f} ± {statistics.stdev(known) if len(known) > 1 else 0:.3f}"
