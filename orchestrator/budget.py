"""`ddm compress RUN --budget "bytes<=0.25,kid<=1.05"`: try compressions, the gentlest first, until one keeps to it."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.errors import ConfigError
from orchestrator.pareto import MEASURES, Point

CANDIDATES: Sequence[Sequence[str]] = (
    ("quantize=int8",),
    ("quantize=int8_compute",),
    ("accelerate=cache",),
    ("accelerate=cache", "quantize=int8_compute"),
    ("quantize=int4",),
    ("quantize=int4_compute",),
    ("quantize=shared",),
    ("quantize=svdquant",),
    ("quantize=budget", "quantize.mean_bits=3.5"),
    ("prune=ecodiff",),
    ("prune=ecodiff", "quantize=int4_compute"),
    ("prune=laptop", "prune.share=0.3", "quantize=int8_compute"),
    ("prune=laptop", "prune.share=0.3", "quantize=int4_compute"),
    ("prune=laptop", "prune.share=0.5", "quantize=int4_compute"),
    ("prune=laptop", "prune.share=0.3", "quantize=int4"),
    ("prune=laptop", "prune.share=0.5", "quantize=int4"),
    ("distill=sid", "distill.steps=4"),
    ("distill=sid", "distill.steps=1", "accelerate=refine"),
    ("distill=sid", "distill.steps=1", "accelerate=refine", "quantize=int8_compute"),
    ("distill=sid", "distill.steps=2", "quantize=int8_compute"),
    ("distill=sid", "distill.steps=2", "prune=laptop", "prune.share=0.3", "quantize=int4_compute"),
)
"""What is tried, in this order: what needs no training first."""

BOUND = re.compile(r"\s*(\w+)\s*<=\s*([0-9.]+)\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Upper bounds by measure."""

    bounds: Mapping[str, float]

    @classmethod
    def parsed(cls, text: str) -> "Budget":
        """From `measure<=number,…`; raises `ConfigError` with the known measures."""
        bounds = {}
        for part in text.split(","):
            found = BOUND.fullmatch(part)
            if found is None or found[1] not in MEASURES or found[2].count(".") > 1:
                raise ConfigError(
                    f"--budget takes bounds such as bytes<=0.25,kid<=1.05, with {', '.join(MEASURES)}, each as a ratio "
                    f"to the whole ensemble (l2 is a distance to it); given: {part!r}"
                )
            bounds[found[1]] = float(found[2])
        return cls(bounds=bounds)

    def broken(self, point: Point) -> Iterator[str]:
        """Every bound that a compressed ensemble does not keep, with what it has."""
        for measure, bound in self.bounds.items():
            value = getattr(point, measure)
            if value is None or value > bound:
                yield f"{measure} is {'not measured' if value is None else f'{value:.3f}'}, at most {bound:g} was asked"


def search(
    budget: Budget, make: Callable[[Sequence[str]], Point], say: Callable[[Sequence[str], Point, list[str]], None]
) -> Point:
    """The first candidate within the budget; `say` hears of each that was tried.

    A candidate that these networks cannot be given is left out by `make`, which raises `Unsuitable` for it. Raises
    `ConfigError` if none is within.
    """
    tried: list[tuple[float, Point]] = []
    for overrides in CANDIDATES:
        try:
            point = make(overrides)
        except Unsuitable:
            continue
        broken = list(budget.broken(point))
        say(overrides, point, broken)
        if not broken:
            return point
        tried.append((_excess(budget, point), point))
    if not tried:
        raise ConfigError("none of the known compressions can be given to this ensemble")
    nearest = min(tried, key=lambda one: one[0])[1]
    raise ConfigError(
        f"none of the {len(tried)} compressions that were tried is within the budget; the nearest is {nearest.name}: "
        f"{'; '.join(budget.broken(nearest))}. Ask for less, or try your own: ddm compress RUN prune=… quantize=…"
    )


class Unsuitable(Exception):  # noqa: N818 - says what it is
    """A compression does not fit this ensemble's networks."""


def _excess(budget: Budget, point: Point) -> float:
    """How far the worst bound is missed, as a ratio."""
    values = [(getattr(point, measure), bound) for measure, bound in budget.bounds.items()]
    return max(float("inf") if value is None else value / bound for value, bound in values)
