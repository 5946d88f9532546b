"""Status of a run, read from its folder alone, so that it works while another process or machine runs it."""

import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from pydantic import FiniteFloat
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text
from typing_extensions import TypedDict

from ddm_core.artifacts import read_manifest, to_jsonable
from ddm_core.json_values import read_record
from orchestrator.errors import RunFolderError
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import Stage
from orchestrator.reporting.costs import format_run_costs
from orchestrator.reporting.progress import format_clock, format_number, format_progress
from orchestrator.run.attempts import Attempt, Progress, load_all_attempts, load_outcome, load_progress
from orchestrator.run.backend import Job
from orchestrator.run.lease import is_alive, read_holder, seconds_since_change
from orchestrator.run.metrics_rows import is_number, sample_rows
from orchestrator.run.run_folder import RunFolder

STRAGGLER_FACTOR = 1.5
"""An expert is a straggler once it has taken so many times the median of the finished experts."""

MAX_EXPERT_ROWS = 24
"""A table of more experts merges those in the same state."""

MAX_REMARKS = 8
"""Experts with a remark that keep their own row among merged ones."""

SHOWN_LOSSES = 8
"""Rows of `metrics.jsonl` that `ddm logs` shows of a stage."""

MAX_ROWS = 1000
"""Rows of `metrics.jsonl` that `ddm logs --json` returns of a stage."""

STYLES = {"finished": "green", "waiting": "dim", "running": "", "lost": "red"}


ESCAPES = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
"""Control characters that could rewrite a terminal."""

PRINTED_AT_ONCE = 2**20
"""Characters."""


class _IslandFacts(TypedDict):
    """Reachability of one island."""

    unreachable_since: FiniteFloat | None
    """Seconds since the epoch."""


class _IslandsRecord(TypedDict):
    """Content of `RunFolder.islands`."""

    islands: dict[str, _IslandFacts]


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusRow:
    """One row of the table: a stage, or several experts in the same state."""

    name: str
    is_expert: bool
    island: str
    state: str
    attempts: int
    seconds: float | None = None
    """Duration of a finished stage."""
    progress: Progress | None = None
    text: str = ""
    remark: str = ""
    """What is wrong with it; such a row stays on its own."""


def status_table(run: RunFolder, *, all_experts: bool = False) -> Group:
    """Return one row per stage: island, state, attempts, progress; many experts share rows unless `all_experts`."""
    attempts = load_all_attempts(run)
    return _table(run, attempts, _rows(run, attempts), all_experts=all_experts)


def _rows(run: RunFolder, attempts: Sequence[Attempt]) -> list[StatusRow]:
    return load_status(run, build_graph(run.load_config()), attempts)


def _table(run: RunFolder, attempts: Sequence[Attempt], rows: Sequence[StatusRow], *, all_experts: bool) -> Group:
    shown = rows if all_experts else merge_experts(rows)
    table = Table()
    has_islands = any(row.island for row in rows)
    for heading in ("stage", *(["island"] if has_islands else []), "state", "attempts", "progress"):
        table.add_column(heading, overflow="fold")
    for row in shown:
        state = Text(row.state, style=STYLES.get(row.state.partition(" ")[0], "yellow"))
        cells = [Text(row.name), *([Text(row.island)] if has_islands else []), state, Text(f"{row.attempts}")]
        remark = Text(f"  {row.remark}" if row.text and row.remark else row.remark, style="yellow")
        table.add_row(*cells, Text(row.text) + remark)
    costs = format_run_costs(run, attempts)
    note = f"{costs}\n`ddm status {run.root} --all` lists every expert" if shown != rows else costs
    return Group(Text(f"{run.root}: {_controller(run)}"), table, Text(note))


def load_facts(run: RunFolder) -> dict[str, Any]:
    """Return the controller and every stage of a run, for scripts."""
    rows, holder = _rows(run, load_all_attempts(run)), read_holder(run)
    controller = {"holder": str(holder), "is_alive": holder.is_alive} if holder else None
    return {"run": run.root, "controller": controller, "stages": rows}


def watch_status(run: RunFolder, console: Console, *, all_experts: bool = False) -> None:
    """Show the table every second while the controller lives; off a terminal, print it when a state has changed."""
    shown: list[str] = []
    with Live(console=console, auto_refresh=False) as live:
        while True:
            attempts = load_all_attempts(run)
            rows = _rows(run, attempts)
            table, states = _table(run, attempts, rows, all_experts=all_experts), [row.state for row in rows]
            if console.is_terminal:
                live.update(table, refresh=True)
            elif states != shown:
                console.print(table)
            shown, holder = states, read_holder(run)
            if holder is None or not holder.is_alive:
                return
            time.sleep(1.0)


def load_status(run: RunFolder, graph: Sequence[Stage], attempts: Sequence[Attempt]) -> list[StatusRow]:
    """Return the status of every stage of a graph; `attempts` are all of the run folder."""
    loaded = {attempt.folder: attempt for attempt in attempts}
    folders = {tries[0].parent.name: tries for tries in run.attempted_stages()}
    rows = [_stage_status(run, stage, folders.get(stage.folder_name, []), loaded) for stage in graph]
    rows = _mark_stragglers(rows, graph, loaded, folders)
    unreachable = unreachable_islands(run)
    return [
        replace(row, state=f"unreachable for {format_clock(time.time() - unreachable[row.island])}")
        if row.state == "running" and row.island in unreachable
        else row
        for row in rows
    ]


def _stage_status(run: RunFolder, stage: Stage, folders: Sequence[Path], loaded: Mapping[Path, Attempt]) -> StatusRow:
    attempt = loaded.get(folders[-1]) if folders else None
    row = StatusRow(
        name=stage.name,
        is_expert=stage.kind == "expert",
        island=attempt.island if attempt else _planned_island(folders),
        state="waiting",
        attempts=len(folders),
    )
    if run.is_finished(stage):
        manifest = read_manifest(run.artifact(stage))
        text = f"{manifest.seconds:.1f} s on {manifest.island or 'local'}"
        return replace(row, state="finished", seconds=manifest.seconds, text=text)
    if not folders:
        return row
    if outcome := load_outcome(folders[-1]):
        return replace(row, state=outcome.state, remark=outcome.error)
    progress = attempt.progress if attempt else load_progress(folders[-1])
    is_lost = attempt is not None and attempt.is_local and not _is_alive(attempt)
    return replace(row, state="lost" if is_lost else "running", progress=progress, text=format_progress(progress))


def _is_alive(attempt: Attempt) -> bool:
    return is_alive(attempt.process, seconds_since_change(attempt.folder))


def _planned_island(folders: Sequence[Path]) -> str:
    """Return the island of an attempt that no worker has started; empty for backends without islands."""
    job = folders[-1] / "job.json" if folders else None
    return read_record(Job, job).island if job and job.is_file() else ""


def _mark_stragglers(
    rows: Sequence[StatusRow],
    graph: Sequence[Stage],
    loaded: Mapping[Path, Attempt],
    folders: Mapping[str, Sequence[Path]],
) -> list[StatusRow]:
    """Add a remark to unfinished experts that take much longer than the finished ones."""
    now, marked = time.time(), []
    tries = [[loaded[folder] for folder in folders.get(stage.folder_name, []) if folder in loaded] for stage in graph]
    durations = [
        attempts[-1].end - attempts[0].start
        for row, attempts in zip(rows, tries, strict=True)
        if row.is_expert and row.seconds is not None and attempts
    ]
    typical = median(durations or [0.0])
    for row, attempts in zip(rows, tries, strict=True):
        factor = (now - attempts[0].start) / typical if attempts and typical > 0 else 0.0
        is_straggler = row.is_expert and row.seconds is None and factor > STRAGGLER_FACTOR
        remark = "  ".join(filter(None, [row.remark, f"straggler: {factor:.1f} x the median"]))
        marked.append(replace(row, remark=remark) if is_straggler else row)
    return marked


def merge_experts(rows: Sequence[StatusRow]) -> list[StatusRow]:
    """Merge many experts in the same state into one row; the first ones with a remark keep their own."""
    if sum(row.is_expert for row in rows) <= MAX_EXPERT_ROWS:
        return list(rows)
    merged: list[list[StatusRow]] = []
    by_state: dict[str, list[StatusRow]] = {}
    remarks = 0
    for row in rows:
        remarks += row.is_expert and bool(row.remark)
        if not row.is_expert or (row.remark and remarks <= MAX_REMARKS):
            merged.append([row])
        elif row.state in by_state:
            by_state[row.state].append(row)
        else:
            merged.append(by_state.setdefault(row.state, [row]))
    return [group[0] if len(group) == 1 else _merge(group) for group in merged]


def _merge(group: Sequence[StatusRow]) -> StatusRow:
    islands = {row.island for row in group}
    return StatusRow(
        name=f"{len(group)} experts",
        is_expert=True,
        island=islands.pop() if len(islands) == 1 else f"{len(islands)} islands",
        state=group[0].state,
        attempts=sum(row.attempts for row in group),
        text=_summarize(group),
        remark=f"such as {group[0].name}: {group[0].remark}" if group[0].remark else "",
    )


def _summarize(group: Sequence[StatusRow]) -> str:
    """Return the range of progress of several experts, or the median duration of finished ones."""
    if durations := [row.seconds for row in group if row.seconds is not None]:
        return f"median {format_clock(median(durations))}"
    known = [row.progress for row in group if row.progress and row.progress.total]
    if not known:
        return ""
    shares = [progress.done / (progress.total or 1.0) for progress in known]
    left = max((progress.left_s or 0.0 for progress in known), default=0.0)
    return f"{min(shares):.0%} to {max(shares):.0%}" + (f"  {format_clock(left)} left at most" if left else "")


def unreachable_islands(run: RunFolder) -> dict[str, float]:
    """Return the islands that the run's controller cannot reach, with the time since when (seconds since the epoch)."""
    if not run.islands.is_file() or read_holder(run) is None:
        return {}
    islands = read_record(_IslandsRecord, run.islands)["islands"]
    return {name: facts["unreachable_since"] for name, facts in islands.items() if facts["unreachable_since"]}


def _controller(run: RunFolder) -> str:
    holder = read_holder(run)
    if holder is None:
        return "no controller"
    if holder.is_alive:
        return f"controlled by {holder}"
    return f"its controller, {holder}, is gone; continue with `ddm resume {run.root}`"


def find_log_file(run: RunFolder, stage_name: str, attempt: int) -> Path:
    """Return the log of a stage's attempt (0 is the latest), or the journal for an empty name.

    Raises `RunFolderError` for an unknown stage or attempt.
    """
    if not stage_name:
        return run.journal
    stages = {stage.name: stage for stage in build_graph(run.load_config())}
    if stage_name not in stages:
        raise RunFolderError(f"{run.root} has no stage {stage_name!r}; its stages are {', '.join(stages)}")
    attempts = run.attempts(stages[stage_name])
    if not attempts or attempt > len(attempts):
        raise RunFolderError(
            f"{stage_name} has {len(attempts)} attempt(s) so far; attempt {attempt or 1} does not exist"
        )
    return attempts[attempt - 1] / "log.txt"


def describe_stage(run: RunFolder, stage_name: str, attempt: Path) -> str:
    """Return the settings of a stage, the losses of an attempt so far, and its time left, as lines of text."""
    stage = next(stage for stage in build_graph(run.load_config()) if stage.name == stage_name)
    settings = yaml.safe_dump({stage_name: to_jsonable(stage.config)}, sort_keys=False, allow_unicode=True)
    metrics = attempt / "metrics.jsonl"
    rows = list(sample_rows(metrics, SHOWN_LOSSES)) if metrics.is_file() else []
    losses = ["  ".join(f"{name} {format_number(value)}" for name, value in _figures(row)) for row in rows]
    progress = load_progress(attempt)
    outcome = load_outcome(attempt)
    now = f"{outcome.state} {outcome.error}".rstrip() if outcome else format_progress(progress)
    return "\n".join([settings, *losses, f"{attempt.name}: {now}", ""])


def load_stage_facts(run: RunFolder, stage_name: str, attempt: Path) -> dict[str, Any]:
    """Return the settings of a stage and, of an attempt, its outcome, its rows of metrics and its log, for scripts."""
    stage = next(stage for stage in build_graph(run.load_config()) if stage.name == stage_name)
    metrics = attempt / "metrics.jsonl"
    return {
        "stage": stage_name,
        "settings": stage.config,
        "attempt": attempt.name,
        "outcome": load_outcome(attempt),
        "metrics": list(sample_rows(metrics, MAX_ROWS)) if metrics.is_file() else [],
        "log": attempt / "log.txt",
    }


def _figures(row: Mapping[str, Any]) -> Iterable[tuple[str, float]]:
    """Return the figures of a metrics row, the step first, and of held-out samples the mean over all t alone."""
    figures = ((name, float(value)) for name, value in row.items() if is_number(value))
    shown = (pair for pair in figures if not pair[0].startswith("held_out_"))
    return sorted(shown, key=lambda pair: pair[0] != "step")


def has_ended(run: RunFolder, attempt: Path | None) -> bool:
    """Return whether an attempt, or the run if None, is over: it has its outcome, or nobody works on the run."""
    holder = read_holder(run)
    return bool(attempt and load_outcome(attempt)) or holder is None or not holder.is_alive


def print_file(path: Path, has_ended: Callable[[], bool] = lambda: True) -> None:
    """Copy a text file to standard output, and what is appended to it until `has_ended`."""
    if not path.is_file():
        raise RunFolderError(f"{path} does not exist yet: its worker has not started")
    with path.open(encoding="utf-8", errors="replace") as file:
        is_last = False
        while not is_last:
            is_last = has_ended()
            while text := file.read(PRINTED_AT_ONCE):
                sys.stdout.write(ESCAPES.sub("\N{REPLACEMENT CHARACTER}", text))
            sys.stdout.flush()
            if not is_last:
                time.sleep(0.5)
