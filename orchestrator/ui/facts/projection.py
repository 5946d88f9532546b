"""What a run still costs: stages that run by their time left, those that wait like the others of their kind."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.config.compute import ComputeConfig
from orchestrator.pipeline.stage import Stage
from orchestrator.reporting.costs import CostRow, mean_costs, reserve, sum_costs
from orchestrator.reporting.status import StatusRow
from orchestrator.run.attempts import Attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """Costs that are still to come."""

    left: CostRow
    """Time, reserved devices and price of the stages whose time is known."""
    unknown: int
    """Unfinished stages whose time is not: none of their kind has reported any."""


def project_costs(
    graph: Sequence[Stage], rows: Sequence[StatusRow], attempts: Sequence[Attempt], compute: ComputeConfig
) -> Projection:
    """Estimate the costs of the unfinished stages from the time left of those that run, and the costs of the others.

    `rows` are the status of the stages of `graph`, `attempts` those at them. The price is that of the island on which
    a stage runs, or of the others of its kind; a retry, and waiting, are not foreseen.
    """
    spent: dict[str, list[CostRow]] = defaultdict(list)
    latest: dict[str, Attempt] = {}
    for attempt in attempts:
        latest[attempt.stage] = attempt
        spent[attempt.stage].append(reserve(attempt, compute, attempt.seconds))
    left: dict[str, CostRow] = {}
    totals: dict[str, list[CostRow]] = defaultdict(list)
    for stage, row in zip(graph, rows, strict=True):
        if row.state == "running" and row.progress and row.progress.left_s is not None:
            left[stage.name] = reserve(latest[stage.name], compute, row.progress.left_s)
        if row.state == "finished" or stage.name in left:
            known = [*spent[stage.name], *([left[stage.name]] if stage.name in left else [])]
            totals[stage.kind].append(sum_costs(known, stage.name))
    waiting = [s for s, row in zip(graph, rows, strict=True) if row.state != "finished" and s.name not in left]
    expected = [mean_costs(totals[stage.kind]) for stage in waiting if totals[stage.kind]]
    return Projection(left=sum_costs([*left.values(), *expected]), unknown=len(waiting) - len(expected))
