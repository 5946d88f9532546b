"""What a person sees while a run is on its way: one line per running stage.

Everything shown is read from the files that the attempts write, so any backend can be watched, and `ddm status` shows
the same. On a terminal the lines stay in place; elsewhere (a log, CI) a line is printed every ten seconds.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from ddm_core.artifacts import read_json
from orchestrator.pipeline.stage import Stage
from orchestrator.run.run_folder import RunFolder

PLAIN_EVERY_S = 10.0


def progress_of(attempt: Path) -> dict[str, Any]:
    """What an attempt last said about itself; empty before its first word."""
    written = attempt / "progress.json"
    return dict(read_json(written)) if written.is_file() else {}


def describe(progress: dict[str, Any]) -> str:
    """Progress in words: share, figures, time left."""
    if not progress:
        return "waiting for a worker"
    done, total, unit = progress["done"], progress["total"], progress["unit"]
    words = [
        f"{done:,} {unit}" if total is None else f"{done / max(total, 1):4.0%}",
        *(f"{name.replace('_per_s', '/s')} {figure(value)}" for name, value in progress["figures"].items()),
    ]
    if progress["left_s"] is not None and done != total:
        words.append(f"{clock(progress['left_s'])} left")
    return "  ".join(words)


def figure(value: float) -> str:
    """A number in four digits, a large one in as many as it has."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class RunDisplay:
    """Shows a walk while the block lasts."""

    def __init__(self, run: RunFolder, console: Console) -> None:
        self.run, self.console = run, console
        self.running: list[Stage] = []
        self._ended = threading.Event()
        self._live = Live(get_renderable=self._table, console=console, refresh_per_second=3, transient=True)
        self._printer = threading.Thread(target=self._print_lines, daemon=True, name="display")

    def __enter__(self) -> Self:
        """Start showing."""
        if self.console.is_terminal:
            self._live.start()
        else:
            self._printer.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop showing."""
        self._ended.set()
        if self.console.is_terminal:
            self._live.stop()
        else:
            self._printer.join()

    def tick(self, running: Sequence[Stage]) -> None:
        """Say which stages are running now."""
        self.running = list(running)

    def event(self, event: str, stage: Stage, text: str) -> None:
        """Print what has happened to a stage."""
        text = escape(text)
        line = {
            "finished": f"[green]✔[/] {stage.name:22} finished {text}",
            "attached": f"[cyan]→[/] {stage.name:22} taken over: {text}",
            "kept": f"[dim]✔ {stage.name:22} finished before[/]",
            "retry": f"[yellow]↻[/] {stage.name:22} {text}",
            "failed": f"[red]✘[/] {stage.name:22} {text}",
            "left_out": f"[yellow]![/] {stage.name:22} the ensemble is assembled without it",
        }[event]
        self.console.print(line, highlight=False, soft_wrap=True)

    def _table(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        for stage in self.running:
            attempts = self.run.attempts(stage)
            progress = progress_of(attempts[-1]) if attempts else {}
            total, done = progress.get("total", 1), progress.get("done", 0)
            bar = ProgressBar(total=total or 1, completed=done, width=24, pulse=total is None)
            table.add_row(f"  {stage.name:22}", bar, describe(progress))
        return table

    def _print_lines(self) -> None:
        while not self._ended.wait(PLAIN_EVERY_S):
            for stage in self.running:
                attempts = self.run.attempts(stage)
                if attempts and (progress := progress_of(attempts[-1])):
                    self.console.print(f"  {stage.name:22} {describe(progress)}", highlight=False, soft_wrap=True)
