"""How far a run is, read from its folder alone: works on a run that another process or machine walks."""

import sys
import time
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from artifacts import read_json, read_manifest
from orchestrator.display import describe, progress_of
from orchestrator.errors import RunFolderError
from orchestrator.graph import build_graph
from orchestrator.lease import is_alive
from orchestrator.run_folder import RunFolder
from orchestrator.stage import Stage


def status_table(run: RunFolder) -> Table:
    """One line per stage: state, attempts, progress."""
    table = Table(title=f"{run.root}: {_controller(run)}")
    for heading in ("stage", "state", "attempts", "progress"):
        table.add_column(heading)
    for stage in build_graph(run.load_config()):
        state, progress = _state(run, stage)
        table.add_row(stage.name, state, str(len(run.attempts(stage))), progress)
    return table


def _controller(run: RunFolder) -> str:
    if not run.lease.exists():
        return "no controller"
    process = read_json(run.lease)
    alive = is_alive(process, time.time() - run.lease.stat().st_mtime)
    name = f"process {process['pid']} on {process['host']}"
    return f"controlled by {name}" if alive else f"its controller, {name}, is gone; go on with `ddm resume {run.root}`"


def _state(run: RunFolder, stage: Stage) -> tuple[str, str]:
    if run.finished(stage):
        manifest = read_manifest(run.artifact(stage))
        return "[green]finished[/]", f"{manifest.seconds:.1f} s on {manifest.island or 'local'}"
    attempts = run.attempts(stage)
    if not attempts:
        return "[dim]waiting[/]", ""
    if (attempts[-1] / "outcome.json").is_file():
        outcome = read_json(attempts[-1] / "outcome.json")
        return f"[yellow]{outcome['state']}[/]", escape(outcome["error"])
    worker = attempts[-1] / "worker.json"
    if worker.is_file() and not is_alive(read_json(worker), time.time() - worker.stat().st_mtime):
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
