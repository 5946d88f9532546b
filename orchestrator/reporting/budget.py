"""The budget of a run: a warning at 80 % of it, and at 100 % the stop that `ddm stop` requests.

It counts what the attempts of the run folder have cost so far, those of earlier controllers too (`costs.py`). A stage
that stops saves its work, so a run may exceed its budget by what `compute.grace_s` costs, and loses nothing.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from orchestrator.config.compute import ComputeConfig
from orchestrator.errors import BudgetReached
from orchestrator.reporting.costs import load_costs, sum_costs
from orchestrator.run.run_folder import RunFolder

WARN_AT = 0.8
"""Share of the budget."""

IDLE_FACTOR = 20
"""Costs are read again after so many times the time that reading them took."""


@dataclass
class Budget:
    """Compares a run's costs with `compute.budget_cost` and `compute.budget_hours`."""

    run: RunFolder
    compute: ComputeConfig
    warn: Callable[[str], None]
    is_reached: bool = False
    has_warned: bool = field(default=False, init=False)
    next_read: float = field(default=0.0, init=False)

    def check(self) -> None:
        """Warn at 80 % of the budget; at 100 %, request a stop and record it in the journal."""
        if self.is_reached or time.monotonic() < self.next_read:
            return
        started = time.monotonic()
        key, spent, limit = max(self._shares(), key=lambda entry: entry[1] / entry[2], default=("", 0.0, 1.0))
        self.next_read = time.monotonic() + IDLE_FACTOR * (time.monotonic() - started)
        text = f"{spent:.4g} of compute.{key}={limit:g} is spent"
        if spent >= limit:
            self.is_reached = True
            self.run.record("budget_reached", text=f"{text}; the run stops")
            self.run.request_stop()
        elif spent >= WARN_AT * limit and not self.has_warned:
            self.has_warned = True
            self.run.record("budget_nearly_reached", text=f"{text}; at 100 % the run stops")
            self.warn(f"{text}; at 100 % the run stops")

    def require(self) -> None:
        """Raise `BudgetReached` if the budget is spent."""
        if spent := [entry for entry in self._shares() if entry[1] >= entry[2]]:
            key, cost, limit = spent[0]
            raise BudgetReached(
                f"compute.{key}={limit:g} is spent: this run has cost {cost:.4g}; finished stages and checkpoints are "
                f"kept; continue with `ddm resume {self.run.root} --{key.replace('_', '-')} {2 * cost:.2g}`"
            )

    def _shares(self) -> Iterator[tuple[str, float, float]]:
        """Yield the key, what is spent, and the limit, of every budget that is set."""
        if self.compute.budget_cost is None and self.compute.budget_hours is None:
            return
        total = sum_costs(load_costs(self.run))
        if self.compute.budget_cost is not None:
            yield "budget_cost", total.price, self.compute.budget_cost
        if self.compute.budget_hours is not None:
            yield "budget_hours", total.seconds / 3600, self.compute.budget_hours
