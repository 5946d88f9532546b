"""What a person sees of a sweep: one line per trial that is at work, and how the others ended.

On a terminal the lines stay in place; elsewhere (a log, CI) a line is printed whenever a trial starts or ends.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from orchestrator.pipeline.graph import build_graph
from orchestrator.reporting.progress import clock, figure
from orchestrator.sweeps.trial import SweepTrial, TrialEnd
from orchestrator.sweeps.trial_pool import RunningTrial

MARKS = {"finished": "[green]✔[/]", "failed": "[red]✘[/]", "stopped": "[yellow]■[/]"}

MOST_ROWS = 20
"""Rows of the table at the end; `sweep.json` has them all."""


class SweepDisplay:
    """Shows a sweep while its block lasts."""

    def __init__(self, console: Console, total: int, metric: str) -> None:
        self.console, self.total, self.metric = console, total, metric
        self.ends: list[TrialEnd] = []

    @contextmanager
    def showing(self, members: Mapping[str, RunningTrial]) -> Iterator[None]:
        """Keep the table of the members up to date on a terminal."""
        if not self.console.is_terminal:
            yield
            return
        with Live(
            get_renderable=lambda: self._table(list(members.values())),
            console=self.console,
            refresh_per_second=2,
            transient=True,
        ):
            yield

    def started(self, trial: SweepTrial) -> None:
        """Say on a log that a trial has a place; a terminal has its row."""
        if not self.console.is_terminal:
            self.print(f"▶ {trial.number:>3} {escape(trial.label)}")

    def ended(self, end: TrialEnd) -> None:
        """Say how a trial ended."""
        self.ends.append(end)
        words = {
            "finished": f"finished in {clock(end.seconds)}" if end.seconds else "finished before",
            "failed": f"[red]failed[/]: {escape(end.error.splitlines()[0]) if end.error else ''}",
            "stopped": "stopped; its work is saved",
        }[end.state]
        score = "" if end.score is None else f", {self.metric} {figure(end.score)}"
        self.print(f"{MARKS[end.state]} {end.trial.number:>3} {escape(end.trial.label)} {words}{score}")

    def print(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def _table(self, members: Sequence[RunningTrial]) -> RenderableType:
        counts = Counter(end.state for end in self.ends)
        waiting = self.total - len(self.ends) - len(members)
        words = [f"{count} {state}" for state, count in counts.items()]
        table = Table(caption=", ".join([*words, f"{len(members)} at work", f"{max(waiting, 0)} waiting"]))
        for heading in ("trial", "values", "state", "stages", self.metric):
            table.add_column(heading)
        for member in members:
            state = "waits for another controller" if member.process is None else "running"
            table.add_row(str(member.trial.number), escape(member.trial.label), state, _stages(member.trial), "")
        for end in self.ends[-5:]:
            score = "" if end.score is None else figure(end.score)
            table.add_row(str(end.trial.number), escape(end.trial.label), end.state, _stages(end.trial), score)
        return table


def _stages(trial: SweepTrial) -> str:
    """How many of its stages are finished."""
    if trial.config is None:
        return "–"
    graph = build_graph(trial.config)
    return f"{sum(trial.run.finished(stage) for stage in graph)}/{len(graph)}"


def ranking(ends: Sequence[TrialEnd], metric: str, *, maximize: bool) -> Table:
    """The finished trials, the best one first."""
    best = ranked(ends, maximize=maximize)
    table = Table(title=f"{len(best)} finished trial(s)")
    keys = list(dict.fromkeys(key for end in best for key in end.trial.parameters))
    for heading in ("trial", *keys, metric):
        table.add_column(heading, overflow="fold")
    for end in best[:MOST_ROWS]:
        values = [escape(end.trial.parameters.get(key, "")) for key in keys]
        table.add_row(str(end.trial.number), *values, "–" if end.score is None else figure(end.score))
    if len(best) > MOST_ROWS:
        table.caption = f"and {len(best) - MOST_ROWS} more"
    return table


def ranked(ends: Sequence[TrialEnd], *, maximize: bool) -> list[TrialEnd]:
    """The finished trials, the best one first, those without a score last."""
    sign = -1.0 if maximize else 1.0
    finished = [end for end in ends if end.state == "finished"]
    return sorted(finished, key=lambda end: (end.score is None, sign * (end.score or 0.0), end.trial.number))
