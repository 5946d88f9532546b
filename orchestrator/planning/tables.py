"""A plan for a terminal; a column that says nothing about this run is left out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.planning.plan import Plan, PlannedStage
from orchestrator.planning.synchronous_baseline import FORMULA
from orchestrator.reporting.costs import size
from orchestrator.reporting.progress import clock

UNKNOWN = "–"


def plan_tables(plan: Plan) -> list[RenderableType]:
    """The stages, what is on islands, the sums, and the comparison with a synchronised monolith."""
    said = Text(plan.calibration, style="dim")
    return [_stages(plan), *_on_islands(plan), *_sums(plan), *_comparison(plan), said]


@dataclass(frozen=True, slots=True)
class _Column:
    heading: str
    cell: Callable[[PlannedStage], str]
    is_wanted: Callable[[Plan], bool] = lambda plan: True


def _stages(plan: Plan) -> Table:
    return _table(f"{plan.name} in {plan.folder}, backend {plan.backend}", STAGES, plan, plan.stages)


def _on_islands(plan: Plan) -> list[RenderableType]:
    rows = [row for row in plan.stages if row.place in plan.islands and row.state != "finished"]
    return [_table("On islands", ISLANDS, plan, rows)] if rows else []


def _table(title: str, columns: Sequence[_Column], plan: Plan, rows: Sequence[PlannedStage]) -> Table:
    table, wanted = Table(title=title, padding=(0, 1, 0, 0)), [column for column in columns if column.is_wanted(plan)]
    for column in wanted:
        is_text = column.heading in ("stage", "state", "place", "reads")
        table.add_column(
            column.heading, justify="left" if is_text else "right", no_wrap=column.heading in ("stage", "state")
        )
    for row in rows:
        table.add_row(*(column.cell(row) for column in wanted))
    return table


def _flops(row: PlannedStage) -> str:
    if row.flops is None:
        return UNKNOWN
    return f"{'≤ ' if row.is_upper_bound else ''}{metric(row.flops)}" if row.flops else ""


def _time(row: PlannedStage) -> str:
    if row.estimate is None:
        return UNKNOWN
    return f"{'≤ ' if row.is_upper_bound else ''}{duration(row.estimate.seconds)}"


def _extra(row: PlannedStage) -> str:
    return duration(row.estimate.extra_s) if row.estimate and row.estimate.extra_s else ""


def _risk(row: PlannedStage) -> str:
    return f"{row.estimate.preemption_probability:.1%}" if row.estimate and row.estimate.preemption_probability else ""


def _price(row: PlannedStage) -> str:
    return f"{row.estimate.price:.4g}" if row.estimate and row.estimate.price else ""


def _bytes(count: int | None) -> str:
    return UNKNOWN if count is None else size(count) if count else ""


def _is_calibrated(plan: Plan) -> bool:
    return plan.seconds is not None


def _may_be_lost(plan: Plan) -> bool:
    return any(row.estimate and row.estimate.preemption_probability for row in plan.stages)


STAGES = (
    _Column("stage", lambda row: row.name),
    _Column("state", lambda row: "[green]finished[/]" if row.state == "finished" else row.state),
    _Column("reads", lambda row: ", ".join(row.reads), lambda plan: not _is_calibrated(plan)),
    _Column("place", lambda row: row.place),
    _Column("CPUs", lambda row: str(row.cpus * row.workers)),
    _Column("GPUs", lambda row: f"{row.gpus * row.workers:g}", lambda plan: any(row.gpus for row in plan.stages)),
    _Column("FLOPs", _flops),
    _Column("time", _time),
    _Column("from", lambda row: "" if row.starts_s is None else duration(row.starts_s), _is_calibrated),
)

ISLANDS = (
    _Column("stage", lambda row: row.name),
    _Column("place", lambda row: row.place),
    _Column("to it", lambda row: _bytes(row.movement.bytes_out)),
    _Column("back", lambda row: _bytes(row.movement.bytes_in)),
    _Column("any loss", _risk, _may_be_lost),
    _Column("losses add", _extra, _may_be_lost),
    _Column("price", _price, lambda plan: plan.price > 0),
)


def _sums(plan: Plan) -> list[RenderableType]:
    if plan.seconds is None:
        return []
    if all(row.state == "finished" for row in plan.stages):
        return [Text("All of it is finished.")]
    least = "at least " if plan.unknown else ""
    words = [f"All of it: {least}{duration(plan.seconds)}"]
    if plan.critical_path_s:
        words.append(f"the longest chain of stages {duration(plan.critical_path_s)}")
    if plan.price:
        words.append(f"price {plan.price:.4g}")
    said: list[RenderableType] = [Text(", ".join(words) + ".")]
    if plan.unknown:
        said.append(Text(f"Not known yet: {', '.join(plan.unknown)}.", style="yellow"))
    return said + _checkpoint_advice(plan)


def _checkpoint_advice(plan: Plan) -> list[RenderableType]:
    """One sentence about the training whose checkpoints are furthest from Young's interval."""
    far: dict[str, tuple[float, float]] = {}
    for row in plan.stages:
        if row.estimate and row.estimate.interval_s and row.estimate.best_interval_s:
            far[row.name] = row.estimate.interval_s, row.estimate.best_interval_s
    if not far:
        return []
    name = max(far, key=lambda name: abs(math.log(far[name][0] / max(far[name][1], 1e-9))))
    now_s, best_s = far[name]
    return [
        Text(
            f"Checkpoints: {name} saves every {duration(now_s)}; Young's formula says every {duration(best_s)} "
            "(expert.training.checkpoint_every, router.training.checkpoint_every)."
        )
    ]


def _comparison(plan: Plan) -> list[RenderableType]:
    found = plan.comparison
    if found is None:
        return []
    whole = found.monolith
    table = Table(title=f"Training alone, on {whole.workers} worker(s) of an expert's size", padding=(0, 1, 0, 0))
    for heading in ("", "experts and router, apart", "one monolith, synchronised"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("time, losses included", duration(found.experts_s), duration(whole.expected_s))
    if found.experts_price or whole.price:
        table.add_row("price", f"{found.experts_price:.4g}", f"{whole.price:.4g}")
    table.add_row("a worker sends, a step", "0 B", size(whole.bytes_per_step))
    table.add_row("all workers send, in all", "0 B", size(whole.total_bytes))
    table.add_row("bandwidth that each needs", "none", f"{metric(whole.bits_per_s)}bit/s")
    table.caption = FORMULA
    return [table]


def duration(seconds: float) -> str:
    """Short times in seconds, long ones as a clock shows them."""
    if not math.isfinite(seconds):
        return "for ever"
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)


def metric(value: float) -> str:
    """A number with a metric prefix, such as `1.23 T`."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "
