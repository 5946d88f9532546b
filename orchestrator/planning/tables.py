"""A plan as tables for a terminal; columns without content for this run are left out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.planning.checks.data_sizes import TRAINING
from orchestrator.planning.plan import Plan, PlannedStage
from orchestrator.planning.synchronous_baseline import FORMULA
from orchestrator.reporting.costs import format_bytes
from orchestrator.reporting.progress import format_clock

UNKNOWN = "–"


def plan_tables(plan: Plan) -> list[RenderableType]:
    """Return tables of the stages and islands, the totals, and the comparison with a synchronous monolith."""
    calibration = Text(plan.calibration, style="dim")
    tables = [_stage_table(plan), *_island_table(plan), *_data_table(plan), *_totals(plan)]
    return [*tables, *_comparison_table(plan), calibration]


@dataclass(frozen=True, slots=True)
class _Column:
    heading: str
    cell: Callable[[PlannedStage], str]
    is_shown: Callable[[Plan], bool] = lambda plan: True


def _stage_table(plan: Plan) -> Table:
    return _build_table(f"{plan.name} in {plan.folder}, backend {plan.backend}", STAGES, plan, plan.stages)


def _island_table(plan: Plan) -> list[RenderableType]:
    rows = [row for row in plan.stages if row.place in plan.islands and row.state != "finished"]
    return [_build_table("On islands", ISLANDS, plan, rows)] if rows else []


def _data_table(plan: Plan) -> list[RenderableType]:
    """Describe what the unfinished stages that read images keep of each, and hold of them at a time."""
    waiting = {row.kind for row in plan.stages if row.state != "finished"}
    sizes = [size for size in plan.data if size.kind in waiting or (size.kind == TRAINING and size.memory_bytes)]
    if not sizes:
        return []
    table = Table(title="Images, at most", padding=(0, 1, 0, 0))
    for heading in ("stage", "disk, each", "memory, at a time", "cache"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for size in sizes:
        amounts = (size.image_bytes, size.memory_bytes, size.cache_bytes)
        table.add_row(size.kind, *(format_bytes(amount) if amount else "" for amount in amounts))
    return [table]


def _build_table(title: str, columns: Sequence[_Column], plan: Plan, rows: Sequence[PlannedStage]) -> Table:
    table = Table(title=Text(title), padding=(0, 1, 0, 0))
    shown = [column for column in columns if column.is_shown(plan)]
    for column in shown:
        is_text = column.heading in ("stage", "state", "place")
        table.add_column(column.heading, justify="left" if is_text else "right", no_wrap=column.heading != "place")
    for row in rows:
        table.add_row(*(Text(column.cell(row)) for column in shown))
    return table


def _format_flops(row: PlannedStage) -> str:
    if row.flops is None:
        return UNKNOWN
    return f"{'≤ ' if row.is_upper_bound else ''}{format_metric(row.flops)}" if row.flops else ""


def _format_time(row: PlannedStage) -> str:
    if row.estimate is None:
        return UNKNOWN
    return f"{'≤ ' if row.is_upper_bound else ''}{format_duration(row.estimate.seconds)}"


def _format_extra_time(row: PlannedStage) -> str:
    return format_duration(row.estimate.extra_s) if row.estimate and row.estimate.extra_s else ""


def _format_risk(row: PlannedStage) -> str:
    return f"{row.estimate.preemption_probability:.1%}" if row.estimate and row.estimate.preemption_probability else ""


def _format_price(row: PlannedStage) -> str:
    return f"{row.estimate.price:.4g}" if row.estimate and row.estimate.price else ""


def _format_count(count: int | None) -> str:
    return UNKNOWN if count is None else format_bytes(count) if count else ""


def _is_calibrated(plan: Plan) -> bool:
    return plan.seconds is not None


def _has_sizes(plan: Plan) -> bool:
    return not _is_calibrated(plan) and any(row.parameters for row in plan.stages)


def _has_losses(plan: Plan) -> bool:
    return any(row.estimate and row.estimate.preemption_probability for row in plan.stages)


STAGES = (
    _Column("stage", lambda row: row.name),
    _Column(
        "state",
        lambda row: row.state,
        lambda plan: any(row.state == "finished" for row in plan.stages),
    ),
    _Column("place", lambda row: row.place, lambda plan: len({row.place for row in plan.stages}) > 1),
    _Column("CPUs", lambda row: str(row.cpus * row.workers)),
    _Column("GPUs", lambda row: f"{row.gpus * row.workers:g}", lambda plan: any(row.gpus for row in plan.stages)),
    _Column("params", lambda row: format_metric(row.parameters) if row.parameters else "", _has_sizes),
    _Column("memory", lambda row: format_bytes(row.memory_bytes) if row.memory_bytes else "", _has_sizes),
    _Column(
        "host",
        lambda row: format_bytes(row.host_bytes) if row.host_bytes else "",
        lambda plan: any(row.host_bytes for row in plan.stages),
    ),
    _Column("FLOPs", _format_flops),
    _Column("time", _format_time, _is_calibrated),
    _Column("time ≥", lambda row: format_duration(row.least_s) if row.least_s else "", _has_sizes),
    _Column("from", lambda row: "" if row.starts_s is None else format_duration(row.starts_s), _is_calibrated),
)

ISLANDS = (
    _Column("stage", lambda row: row.name),
    _Column("place", lambda row: row.place),
    _Column("to it", lambda row: _format_count(row.movement.bytes_out)),
    _Column("back", lambda row: _format_count(row.movement.bytes_in)),
    _Column("any loss", _format_risk, _has_losses),
    _Column("losses add", _format_extra_time, _has_losses),
    _Column("price", _format_price, lambda plan: plan.price > 0),
)


def _totals(plan: Plan) -> list[RenderableType]:
    if plan.seconds is None:
        return []
    if all(row.state == "finished" for row in plan.stages):
        return [Text("All stages are finished.")]
    least = "at least " if plan.unknown else ""
    words = [f"All stages: {least}{format_duration(plan.seconds)}"]
    if plan.critical_path_s:
        words.append(f"the longest chain of stages {format_duration(plan.critical_path_s)}")
    if plan.price:
        words.append(f"price {plan.price:.4g}")
    lines: list[RenderableType] = [Text(", ".join(words) + ".")]
    if plan.unknown:
        lines.append(Text(f"Unknown duration: {', '.join(plan.unknown)}.", style="yellow"))
    return lines + _checkpoint_advice(plan)


def _checkpoint_advice(plan: Plan) -> list[RenderableType]:
    """Describe the training whose checkpoint interval is furthest from Young's."""
    intervals: dict[str, tuple[float, float]] = {}
    for row in plan.stages:
        if row.estimate and row.estimate.interval_s and row.estimate.best_interval_s:
            intervals[row.name] = row.estimate.interval_s, row.estimate.best_interval_s
    if not intervals:
        return []
    name = max(intervals, key=lambda name: abs(math.log(intervals[name][0] / max(intervals[name][1], 1e-9))))
    now_s, best_s = intervals[name]
    return [
        Text(
            f"Checkpoints: {name} saves every {format_duration(now_s)}; Young's formula gives "
            f"{format_duration(best_s)} (expert.training.checkpoint_every, router.training.checkpoint_every)."
        )
    ]


def _comparison_table(plan: Plan) -> list[RenderableType]:
    comparison = plan.comparison
    if comparison is None:
        return []
    monolith = comparison.monolith
    table = Table(title=f"Training alone, on {monolith.workers} worker(s) of an expert's size", padding=(0, 1, 0, 0))
    for heading in ("", "experts and router, independent", "one monolith, synchronous"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("time, losses included", format_duration(comparison.experts_s), format_duration(monolith.expected_s))
    if comparison.experts_price or monolith.price:
        table.add_row("price", f"{comparison.experts_price:.4g}", f"{monolith.price:.4g}")
    table.add_row("a worker sends, a step", "0 B", format_bytes(monolith.bytes_per_step))
    table.add_row("all workers send, in all", "0 B", format_bytes(monolith.total_bytes))
    table.add_row("bandwidth that each needs", "none", f"{format_metric(monolith.bits_per_s)}bit/s")
    table.caption = FORMULA
    return [table]


def format_duration(seconds: float) -> str:
    """Format times below a minute in seconds, longer ones as h:mm:ss."""
    if not math.isfinite(seconds):
        return "forever"
    return f"{seconds:.1f} s" if seconds < 60 else format_clock(seconds)


def format_metric(value: float) -> str:
    """Format a number with a metric prefix, such as `1.23 T`."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "
