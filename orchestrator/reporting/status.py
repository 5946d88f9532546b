"""How far a run is, read from its folder alone: works on a run that another process or machine walks."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from rich.markup import escape
from rich.table import Table

from ddm_core.artifacts import read_json, read_manifest
from orchestrator.config.compute import CONTROLLER
from orchestrator.errors import RunFolderError
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import Stage
from orchestrator.reporting.costs import cost_line
from orchestrator.reporting.progress import clock, describe, progress_of
from orchestrator.run.lease import holder, idle_s, is_alive
from orchestrator.run.run_folder import RunFolder

STRAGGLER = 1.5
"""An expert that has taken so many times the median of its finished siblings is pointed out."""


def status_table(run: RunFolder) -> Table:
    """One line per stage: where it is, its state, attempts, progress."""
    graph = build_graph(run.load_config())
    silent = silent_islands(run)
    slow = stragglers(run, graph)
    table = Table(title=f"{run.root}: {_controller(run)}")
    for heading in ("stage", "island", "state", "attempts", "progress"):
        table.add_column(heading)
    for stage in graph:
        attempts = run.attempts(stage)
        island = _island(attempts)
        state, progress = _state(run, stage, attempts, island)
        if state == "running" and island in silent:
            state = f"[yellow]unreachable[/] for {clock(time.time() - silent[island])}"
        if stage.name in slow:
            progress += f"  [yellow]straggler: {slow[stage.name]:.1f} x the median[/]"
        table.add_row(stage.name, island, state, str(len(attempts)), progress)
    table.caption = cost_line(run)
    return table


def silent_islands(run: RunFolder) -> dict[str, float]:
    """Islands that do not answer the run's controller, and since when (seconds since the epoch)."""
    if not run.islands.is_file() or not run.lease.exists():
        return {}
    told = read_json(run.islands)
    return {name: facts["unreachable_since"] for name, facts in told.items() if facts["unreachable_since"] is not None}


def stragglers(run: RunFolder, graph: Sequence[Stage]) -> dict[str, float]:
    """Running experts that have taken much longer than their finished siblings, as multiples of the median."""
    experts = [stage for stage in graph if stage.kind == "expert" and run.attempts(stage)]
    took = [read_manifest(run.artifact(stage)).seconds for stage in experts if run.finished(stage)]
    if not took or median(took) <= 0:
        return {}
    begun = {stage.name: run.attempts(stage)[0].stat().st_mtime for stage in experts if not run.finished(stage)}
    times = {name: (time.time() - start) / median(took) for name, start in begun.items()}
    return {name: factor for name, factor in times.items() if factor > STRAGGLER}


def _island(attempts: Sequence[Path]) -> str:
    """Where the latest attempt was sent; empty for backends that are one place."""
    given = attempts[-1] / "job.json" if attempts else None
    return str(read_json(given)["island"]) if given and given.is_file() else ""


def _controller(run: RunFolder) -> str:
    found = holder(run)
    if found is None:
        return "no controller"
    if found.is_alive:
        return f"controlled by {found}"
    return f"its controller, {found}, is gone; go on with `ddm resume {run.root}`"


def _state(run: RunFolder, stage: Stage, attempts: Sequence[Path], island: str) -> tuple[str, str]:
    if run.finished(stage):
        manifest = read_manifest(run.artifact(stage))
        return "[green]finished[/]", f"{manifest.seconds:.1f} s on {manifest.island or 'local'}"
    if not attempts:
        return "[dim]waiting[/]", ""
    if (attempts[-1] / "outcome.json").is_file():
        outcome = read_json(attempts[-1] / "outcome.json")
        return f"[yellow]{outcome['state']}[/]", escape(outcome["error"])
    worker = attempts[-1] / "worker.json"
    at_home = island in ("", CONTROLLER)
    if at_home and worker.is_file() and not is_alive(read_json(worker), idle_s(attempts[-1])):
        return "[red]lost[/]", describe(progress_of(attempts[-1]))
    return "running", describe(progress_of(attempts[-1]))


def log_file(run: RunFolder, stage_name: str, attempt: int) -> Path:
    """The log of a stage's attempt (0 is the latest), or the journal for an empty name."""
    if not stage_name:
        return run.journal
    stages = {stage.name: stage for stage in build_graph(run.load_config())}
    if stage_name not in stages:
        raise RunFolderError(f"{run.root} has no stage {stage_name!r}; it has {', '.join(stages)}")
    attempts = run.attempts(stages[stage_name])
    if not attempts or attempt > len(attempts):
        raise RunFolderError(f"{stage_name} has {len(attempts)} attempt(s) so far; attempt {attempt or 1} is not there")
    return attempts[attempt - 1] / "log.txt"


def print_file(path: Path, *, follow: bool) -> None:
    """Copy a text file to standard output, and with `follow` whatever is added to it until Ctrl-C."""
    if not path.is_file():
        raise RunFolderError(f"{path} is not written yet: its worker has not started")
    with path.open(encoding="utf-8") as file:
        while True:
            sys.stdout.write(file.read())
            sys.stdout.flush()
            if not follow:
                return
            time.sleep(0.5)
