"""A search space and a point of it, between what Hydra parses and what Optuna draws."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A swept key and the values that it may take: choices, or numbers from `low` to `high`, both included."""

    key: str
    choices: tuple[str, ...] = ()
    """As they are written on the command line; empty for numbers."""
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    """Distance between two numbers; None for all of them."""
    is_log: bool = False
    """Whether small numbers are as likely as large ones, by order of magnitude."""
    is_whole: bool = False
    """Whether the numbers are integers."""

    def text(self, value: str | float) -> str:
        """A value as it is written on the command line, without the rounding errors of a step."""
        if isinstance(value, str):
            return value
        if self.is_whole:
            return str(int(value))
        if self.step is None:
            return repr(float(value))
        return repr(round(self.low + round((value - self.low) / self.step) * self.step, 12))


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A point of the space under a number: a trial as Optuna knows it."""

    number: int
    parameters: dict[str, str]
    """Swept key and value, as they are written on the command line."""
    score: float | None = None
    """None as long as it is open."""
