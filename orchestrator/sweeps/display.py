"""The display of a sweep: one row per running trial, and how the others ended.

A terminal shows a table that is updated in place; a log or CI gets a line whenever a trial starts or ends.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from orchestrator.pipeline.graph import build_graph
from orchestrator.reporting.progress import format_clock, format_number
from orchestrator.sweeps.trial import SweepTrial, TrialEnd
from orchestrator.sweeps.trial_pool import RunningTrial

MARKS = {"finished": "[green]✔[/]", "failed": "[red]✘[/]", "stopped": "[yellow]■[/]"}

MAX_ROWS = 20
"""Rows of the final table; `sweep.json` has all trials."""


class SweepDisplay:
    """Shows the trials of a sweep."""

    def __init__(self, console: Console, total: int, metric: str) -> None:
        self.console, self.total, self.metric = console, total, metric
        self.ends: list[TrialEnd] = []

    @contextmanager
    def show_live(self, running: Mapping[str, RunningTrial]) -> Iterator[None]:
        """Update a table of the running trials on a terminal while the block lasts."""
        if not self.console.is_terminal:
            yield
            return
        with Live(
            get_renderable=lambda: self._table(list(running.values())),
            console=self.console,
            refresh_per_second=2,
            transient=True,
        ):
            yield

    def show_start(self, trial: SweepTrial) -> None:
        """Print that a trial has started, unless a terminal shows its row."""
        if not self.console.is_terminal:
            self.print_line(f"▶ {trial.number:>3} {escape(trial.label)}")

    def show_end(self, end: TrialEnd) -> None:
        """Print how a trial ended."""
        self.ends.append(end)
        words = {
            "finished": f"finished in {format_clock(end.seconds)}" if end.seconds else "finished before",
            "failed": f"[red]failed[/]: {escape(' '.join(map(str.strip, end.error.splitlines()[:2])))}",
            "stopped": "stopped; its work is saved",
        }[end.state]
        score = "" if end.score is None else f", {self.metric} {format_number(end.score)}"
        self.print_line(f"{MARKS[end.state]} {end.trial.number:>3} {escape(end.trial.label)} {words}{score}")

    def print_line(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def _table(self, running: Sequence[RunningTrial]) -> RenderableType:
        counts = Counter(end.state for end in self.ends)
        waiting = self.total - len(self.ends) - len(running)
        words = [f"{count} {state}" for state, count in counts.items()]
        table = Table(caption=", ".join([*words, f"{len(running)} running", f"{max(waiting, 0)} waiting"]))
        for heading in ("trial", "values", "state", "stages", self.metric):
            table.add_column(heading)
        for entry in running:
            state = "waits for another controller" if entry.process is None else "running"
            table.add_row(str(entry.trial.number), escape(entry.trial.label), state, _stage_progress(entry.trial), "")
        for end in self.ends[-5:]:
            score = "" if end.score is None else format_number(end.score)
            table.add_row(str(end.trial.number), escape(end.trial.label), end.state, _stage_progress(end.trial), score)
        return table


def _stage_progress(trial: SweepTrial) -> str:
    """Return the number of finished stages and of all stages."""
    if trial.config is None:
        return "–"
    graph = build_graph(trial.config)
    return f"{sum(trial.run.is_finished(stage) for stage in graph)}/{len(graph)}"


def ranking_table(ends: Sequence[TrialEnd], metric: str, *, maximize: bool) -> Table:
    """Return a table of the finished trials, best first."""
    ranked = rank_trials(ends, maximize=maximize)
    table = Table(title=f"{len(ranked)} finished trial(s)")
    keys = list(dict.fromkeys(key for end in ranked for key in end.trial.parameters))
    for heading in ("trial", *keys, metric):
        table.add_column(heading, overflow="fold")
    for end in ranked[:MAX_ROWS]:
        values = [escape(end.trial.parameters.get(key, "")) for key in keys]
        table.add_row(str(end.trial.number), *values, "–" if end.score is None else format_number(end.score))
    if len(ranked) > MAX_ROWS:
        table.caption = f"and {len(ranked) - MAX_ROWS} more"
    return table


def rank_trials(ends: Sequence[TrialEnd], *, maximize: bool) -> list[TrialEnd]:
    """Return the finished trials, best first; those without a score are last."""
    sign = -1.0 if maximize else 1.0
    finished = [end for end in ends if end.state == "finished"]
    return sorted(finished, key=lambda end: (end.score is None, sign * (end.score or 0.0), end.trial.number))
