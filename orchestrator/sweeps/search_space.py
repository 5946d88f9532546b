"""A search space and its points, between Hydra's parser and Optuna's sampler."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A swept key and its possible values: choices, or numbers from `low` to `high` inclusive."""

    key: str
    choices: tuple[str, ...] = ()
    """As written on the command line; empty for numbers."""
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    """Distance between two numbers; None allows all numbers in between."""
    is_log: bool = False
    """Whether numbers are sampled uniformly on a logarithmic scale."""
    is_integer: bool = False
    """Whether the numbers are integers."""

    def format_value(self, value: str | float) -> str:
        """Format a value as on the command line, without rounding errors of the step."""
        if isinstance(value, str):
            return value
        if self.is_integer:
            return str(int(value))
        if self.step is None:
            return repr(float(value))
        return repr(round(self.low + round((value - self.low) / self.step) * self.step, 12))


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A numbered point of the space: a trial in Optuna's sense."""

    number: int
    parameters: dict[str, str]
    """Swept keys and values, as written on the command line."""
    score: float | None = None
    """None while the proposal is open."""
