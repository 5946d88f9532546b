"""Status of a run, read from its folder alone, so that it works while another process or machine runs it."""

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from pydantic import FiniteFloat
from rich.markup import escape
from rich.table import Table
from typing_extensions import TypedDict

from ddm_core.artifacts import read_manifest
from ddm_core.json_values import read_record
from orchestrator.config.compute import CONTROLLER
from orchestrator.errors import RunFolderError
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import Stage
from orchestrator.reporting.costs import format_run_costs
from orchestrator.reporting.progress import format_clock, format_progress
from orchestrator.run.attempts import load_progress
from orchestrator.run.backend import AttemptOutcome, Job
from orchestrator.run.lease import ProcessRecord, is_alive, read_holder, seconds_since_change
from orchestrator.run.run_folder import RunFolder

STRAGGLER_FACTOR = 1.5
"""An expert is a straggler once it has taken so many times the median of the finished experts."""


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


def status_table(run: RunFolder) -> Table:
    """Return one row per stage: island, state, attempts, progress."""
    graph = build_graph(run.load_config())
    unreachable = unreachable_islands(run)
    slow = stragglers(run, graph)
    table = Table(title=f"{run.root}: {_controller(run)}")
    for heading in ("stage", "island", "state", "attempts", "progress"):
        table.add_column(heading)
    for stage in graph:
        attempts = run.attempts(stage)
        island = _island(attempts)
        state, progress = _state(run, stage, attempts, island)
        if state == "running" and island in unreachable:
            state = f"[yellow]unreachable[/] for {format_clock(time.time() - unreachable[island])}"
        if stage.name in slow:
            progress += f"  [yellow]straggler: {slow[stage.name]:.1f} x the median[/]"
        table.add_row(stage.name, island, state, str(len(attempts)), progress)
    table.caption = format_run_costs(run)
    return table


def unreachable_islands(run: RunFolder) -> dict[str, float]:
    """Return the islands that the run's controller cannot reach, with the time since when (seconds since the epoch)."""
    if not run.islands.is_file() or read_holder(run) is None:
        return {}
    islands = read_record(_IslandsRecord, run.islands)["islands"]
    return {name: facts["unreachable_since"] for name, facts in islands.items() if facts["unreachable_since"]}


def stragglers(run: RunFolder, graph: Sequence[Stage]) -> dict[str, float]:
    """Return running experts that take much longer than the finished ones, with the multiple of the median."""
    experts = [stage for stage in graph if stage.kind == "expert" and run.attempts(stage)]
    durations = [read_manifest(run.artifact(stage)).seconds for stage in experts if run.is_finished(stage)]
    if not durations or median(durations) <= 0:
        return {}
    starts = {stage.name: run.attempts(stage)[0].stat().st_mtime for stage in experts if not run.is_finished(stage)}
    factors = {name: (time.time() - start) / median(durations) for name, start in starts.items()}
    return {name: factor for name, factor in factors.items() if factor > STRAGGLER_FACTOR}


def _island(attempts: Sequence[Path]) -> str:
    """Return the island of the latest attempt; empty for backends without islands."""
    job = attempts[-1] / "job.json" if attempts else None
    return read_record(Job, job).island if job and job.is_file() else ""


def _controller(run: RunFolder) -> str:
    holder = read_holder(run)
    if holder is None:
        return "no controller"
    if holder.is_alive:
        return f"controlled by {holder}"
    return f"its controller, {holder}, is gone; continue with `ddm resume {run.root}`"


def _state(run: RunFolder, stage: Stage, attempts: Sequence[Path], island: str) -> tuple[str, str]:
    if run.is_finished(stage):
        manifest = read_manifest(run.artifact(stage))
        return "[green]finished[/]", f"{manifest.seconds:.1f} s on {manifest.island or 'local'}"
    if not attempts:
        return "[dim]waiting[/]", ""
    if (attempts[-1] / "outcome.json").is_file():
        outcome = read_record(AttemptOutcome, attempts[-1] / "outcome.json")
        return f"[yellow]{outcome.state}[/]", escape(outcome.error)
    worker = attempts[-1] / "worker.json"
    is_local = island in ("", CONTROLLER)
    if (
        is_local
        and worker.is_file()
        and not is_alive(read_record(ProcessRecord, worker), seconds_since_change(attempts[-1]))
    ):
        return "[red]lost[/]", format_progress(load_progress(attempts[-1]))
    return "running", format_progress(load_progress(attempts[-1]))


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


def print_file(path: Path, *, follow: bool) -> None:
    """Copy a text file to standard output; `follow` also copies what is appended, until Ctrl-C."""
    if not path.is_file():
        raise RunFolderError(f"{path} does not exist yet: its worker has not started")
    with path.open(encoding="utf-8", errors="replace") as file:
        while True:
            while text := file.read(PRINTED_AT_ONCE):
                sys.stdout.write(ESCAPES.sub("\N{REPLACEMENT CHARACTER}", text))
            sys.stdout.flush()
            if not follow:
                return
            time.sleep(0.5)
