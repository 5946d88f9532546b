"""What changed in a run folder since a second ago: one look for all viewers of a run, none without viewers.

Only sizes and times of files are compared, so a look costs the same however long the files are. A viewer that reads
slowly gets the changes of several looks at once.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anyio import Event

from orchestrator.errors import RunFolderError
from orchestrator.run.metrics_rows import is_number, read_last_row
from orchestrator.run.run_folder import RunFolder
from orchestrator.ui.facts.catalog import require_inside
from orchestrator.ui.facts.look import Look, look

PERIOD_S = 1.0


@dataclass(slots=True)
class Changes:
    """What a viewer has not been sent yet."""

    status: bool = False
    rows: dict[str, list[float | None]] = field(default_factory=dict)
    """Step, loss and held-out loss (None: none) of the last row, by stage."""
    logs: set[str] = field(default_factory=set)
    """Stages whose log has grown."""
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self) -> Iterator[tuple[str, Any]]:
        """Yield the kinds of changes with their data, and forget them."""
        self.arrived.clear()
        if self.rows:
            yield "rows", self.rows
        if self.logs:
            yield "logs", sorted(self.logs)
        if self.status:
            yield "status", True
        self.status, self.rows, self.logs = False, {}, set()


@dataclass(slots=True)
class _Watch:
    """One watched run."""

    viewers: list[Changes] = field(default_factory=list)
    has_looked: asyncio.Event = field(default_factory=asyncio.Event)
    """Set after the first look: what changes later is passed on."""
    task: asyncio.Task[None] | None = None


class RunWatcher:
    """Looks at every watched run once in a period, and passes the changes on."""

    def __init__(self, period_s: float = PERIOD_S) -> None:
        self.period_s = period_s
        self._watches: dict[RunFolder, _Watch] = {}

    async def watch(self, run: RunFolder, ended: Event) -> AsyncIterator[tuple[str, Any]]:
        """Yield `open`, and then every change of a run: `rows`, `logs` or `status`, each with its data.

        It ends within a period after `ended` is set.
        """
        watch = self._watches.setdefault(run, _Watch())
        if watch.task is None:
            watch.task = asyncio.create_task(self._look_again_and_again(run, watch))
        changes = Changes()
        watch.viewers.append(changes)
        try:
            await watch.has_looked.wait()
            yield "open", True
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changes.arrived.wait(), self.period_s)
                for change in changes.take():
                    yield change
        finally:
            watch.viewers.remove(changes)
            if not watch.viewers:
                watch.task.cancel()
                self._watches.pop(run)

    async def _look_again_and_again(self, run: RunFolder, watch: _Watch) -> None:
        before = await asyncio.to_thread(look, run)
        watch.has_looked.set()
        while True:
            await asyncio.sleep(self.period_s)
            now = await asyncio.to_thread(look, run)
            if now == before:
                continue
            rows = await asyncio.to_thread(_last_rows, run, _changed(before, now, "metrics.jsonl"))
            logs = {_stage_name(folder) for folder in _changed(before, now, "log.txt")}
            has_new_status = (before.holder, before.status) != (now.holder, now.status)
            for changes in watch.viewers:
                changes.status |= has_new_status
                changes.rows |= rows
                changes.logs |= logs
                changes.arrived.set()
            before = now


def _changed(before: Look, now: Look, name: str) -> list[str]:
    return [folder for folder, stamp in now.growing[name].items() if before.growing[name].get(folder) != stamp]


def _last_rows(run: RunFolder, folders: list[str]) -> dict[str, list[float | None]]:
    """Return step, loss and held-out loss of the last rows of some attempts' metrics, by stage."""
    rows: dict[str, list[float | None]] = {}
    for folder in folders:
        with contextlib.suppress(OSError, RunFolderError):
            row = read_last_row(require_inside(run, run.root / folder / "metrics.jsonl"))
            if row is not None and is_number(row.get("loss")):
                held_out = row.get("held_out")
                rows[_stage_name(folder)] = [row["step"], row["loss"], held_out if is_number(held_out) else None]
    return rows


def _stage_name(attempt: str) -> str:
    """Return the stage's name of an attempt's folder `work/<stage>-<fingerprint>/attempt_<n>`."""
    return Path(attempt).parent.name.rpartition("-")[0]
