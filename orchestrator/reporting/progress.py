"""Progress display of a run: one line per running stage.

It reads only the files that attempts write, so it works for every backend, and `ddm status` shows the same. On a
terminal the lines stay in place. Elsewhere (a log, CI) a line is printed when something has changed, at most one a
minute for each stage; the end of a stage is its event's line alone.
"""

import math
import threading
import time
from collections.abc import Sequence
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.pipeline.stage import FIRST_SAMPLES, Stage
from orchestrator.run.attempts import Progress, load_progress
from orchestrator.run.run_folder import RunFolder

LOOK_EVERY_S, PRINT_EVERY_S = 2.0, 60.0
"""Off a terminal: between two looks at the progress, and at least between two lines of one stage."""

MARKS = {
    "finished": ("✔", "green"),
    "attached": ("→", "cyan"),
    "kept": ("✔", ""),
    "retry": ("↻", "yellow"),
    "stopping": ("■", "yellow"),
    "failed": ("✘", "red"),
    "notice": ("!", "yellow"),
    "left_out": ("!", "yellow"),
}
"""Mark and color of a line by its event."""


def format_progress(progress: Progress | None) -> str:
    """Return progress as text: share, figures, time left."""
    if progress is None:
        return "waiting for a worker"
    if progress.is_damaged:
        return "unknown, as its progress.json is damaged"
    done, total = progress.done, progress.total
    parts = [
        f"{done:,.0f} {progress.unit}" if total is None else f"{done / max(total, 1):4.0%}",
        *(f"{name.replace('_per_s', '/s')} {format_number(value)}" for name, value in progress.figures.items()),
    ]
    if progress.left_s is not None and done != total:
        parts.append(f"{format_clock(progress.left_s)} left")
    return "  ".join(parts)


def format_number(value: float) -> str:
    """Return a number in four digits, or a large one rounded to an integer."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_clock(seconds: float) -> str:
    """Return seconds as m:ss or h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class RunDisplay:
    """Context manager that displays a run's running stages."""

    def __init__(self, run: RunFolder, console: Console) -> None:
        self.run, self.console = run, console
        self.running: list[Stage] = []
        self._has_shown_samples, self._next_look = False, 0.0
        self._ended = threading.Event()
        self._printed: dict[str, tuple[float, str]] = {}
        """When a line of each stage was printed last, and that line."""
        self._live = Live(get_renderable=self._table, console=console, refresh_per_second=3, transient=True)
        self._printer = threading.Thread(target=self._print_lines, daemon=True, name="display")

    def __enter__(self) -> Self:
        """Start the display."""
        if self.console.is_terminal:
            self._live.start()
        else:
            self._printer.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the display."""
        self._ended.set()
        if self.console.is_terminal:
            self._live.stop()
        else:
            self._printer.join()

    def tick(self, running: Sequence[Stage]) -> None:
        """Set the stages that are running now, and name the first samples once an expert has drawn them."""
        self.running = list(running)
        if not self._has_shown_samples and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_EVERY_S
            for stage in self.running:
                self._show_samples(stage)

    def event(self, event: str, stage: Stage, text: str) -> None:
        """Print an event of a stage."""
        mark, color = MARKS[event]
        words = {"finished": f"finished {text}", "attached": f"taken over: {text}", "kept": "finished before"}
        words["left_out"] = "the ensemble is assembled without it"
        line = Text.assemble((mark, color), f" {stage.name:22} {words.get(event, text)}")
        self.console.print(line, style="dim" if event == "kept" else None, soft_wrap=True)
        if event in ("finished", "failed"):
            self._printed.pop(stage.name, None)
        if event == "finished":
            self._show_samples(stage)

    def _show_samples(self, stage: Stage) -> None:
        """Print where the first samples are, those of the first expert; on an island they stay there."""
        if self._has_shown_samples or stage.kind != "expert":
            return
        for attempt in self.run.attempts(stage)[-1:]:
            if (samples := attempt / FIRST_SAMPLES).is_file():
                self._has_shown_samples = True
                self.console.print(Text(f"  first samples, of {stage.name} alone: {samples}"), soft_wrap=True)

    def _table(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        for stage in self.running:
            attempts = self.run.attempts(stage)
            progress = load_progress(attempts[-1]) if attempts else None
            is_unknown = progress is not None and progress.total is None
            total = progress.total if progress is not None and progress.total else 1
            done = progress.done if progress is not None else 0
            bar = ProgressBar(total=total, completed=done, width=24, pulse=is_unknown)
            table.add_row(Text(f"  {stage.name:22}"), bar, Text(format_progress(progress)))
        return table

    def _print_lines(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            for stage in self.running:
                attempts = self.run.attempts(stage)
                progress = load_progress(attempts[-1]) if attempts else None
                line = f"  {stage.name:22} {format_progress(progress)}"
                printed, last = self._printed.get(stage.name, (-math.inf, ""))
                if progress and progress.done != progress.total and line != last and self._is_due(printed):
                    self._printed[stage.name] = (time.monotonic(), line)
                    self.console.print(Text(line), soft_wrap=True)

    @staticmethod
    def _is_due(printed: float) -> bool:
        return time.monotonic() - printed >= PRINT_EVERY_S
