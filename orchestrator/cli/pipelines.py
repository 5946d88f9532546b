"""What several commands share: overrides, opening a run, the result of a pipeline, and sweeps."""

import glob
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ddm_core.errors import DDMError
from orchestrator.cli.exits import INTERRUPTED
from orchestrator.errors import ConfigError, RunFailed
from orchestrator.reporting.terminal import open_console, print_json

console = open_console()

MAX_RUNS = 5
"""Runs for which `ddm` alone shows a next step."""

MAX_SEEDS = 10_000
"""Images of one grid."""


def complete_run(incomplete: str) -> list[str]:
    """Return the run folders whose paths begin with the text, at most one folder deeper, for a shell."""
    files = (file for end in ("*", "*/*") for file in glob.glob(f"{glob.escape(incomplete)}{end}/config.yaml"))
    return sorted(os.path.dirname(file) for file in files)


RunArgument = Annotated[
    Path, typer.Argument(help="The run folder, such as runs/demo", metavar="RUN", autocompletion=complete_run)
]


def show_next_steps(context: typer.Context) -> None:
    """Train and sample decentralized diffusion models."""
    if context.invoked_subcommand is not None:
        return
    runs = sorted(Path("runs").glob("*/config.yaml"), key=lambda file: -file.stat().st_mtime)[:MAX_RUNS]
    steps = [step for file in runs for step in _next_steps(file.parent)]
    if not steps:
        steps = [
            ("ddm run experiment=digits", "a first run, in about a minute"),
            ("ddm init ~/pictures", "look at your own pictures"),
        ]
    table = Table(box=None, show_header=False, pad_edge=False)
    for command, purpose in [*steps, ("ddm --help", "all commands")]:
        table.add_row(Text(command, style="bold"), purpose)
    console.print(table)


def _next_steps(folder: Path) -> list[tuple[str, str]]:
    """Return the commands that make sense now for a run, each with its purpose."""
    from orchestrator.reporting.results import current_graph, has_ensemble
    from orchestrator.run.lease import read_holder

    try:
        run = open_run(folder)
        holder, config = read_holder(run), run.load_config()
        is_finished = has_ensemble(run, current_graph(run, config))
    except DDMError:
        return [(f"ddm status {folder}", "cannot be read; this shows why")]
    if holder is not None and holder.is_alive:
        return [(f"ddm status {folder} --watch", "it runs")]
    if not is_finished:
        return [(f"ddm resume {folder}", "it has not finished")]
    return [(f"ddm sample {folder}", "finished: draw images"), (f"ddm serve {folder}", "or serve them over HTTP")]


def complete_stage(context: typer.Context, incomplete: str) -> list[str]:
    """Return the stages of the run on the command line that begin with the text, for a shell."""
    from orchestrator.pipeline.graph import build_graph

    try:
        stages = build_graph(open_run(Path(context.params["run"])).load_config())
    except (DDMError, KeyError):
        return []
    return [stage.name for stage in stages if stage.name.startswith(incomplete)]


def with_file(path: Path | None, overrides: list[str] | None) -> list[str]:
    """Return the overrides of a file, and after them those of the command line."""
    if path is None:
        return overrides or []
    from orchestrator.config.config_file import read_overrides

    return [*read_overrides(path), *(overrides or [])]


def fit(overrides: list[str]) -> list[str]:
    """Return the overrides with settings that fit a folder of pictures."""
    if "data=image_folder" not in overrides:
        return overrides
    from orchestrator.planning.checks.own_pictures import fit_overrides

    return fit_overrides(overrides, console)


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of `0-15`, `3,5,8` or both; raises `ConfigError` for anything else."""
    from ddm_core.seeds import MAX_SEED

    try:
        parts = [part.strip().partition("-") for part in text.split(",")]
        ranges = [(int(first), int(last or first)) for first, _, last in parts]
    except ValueError:
        raise ConfigError(f"--seeds takes numbers and ranges such as 0-15 or 3,5,8; got {text!r}") from None
    count = sum(max(0, last - first + 1) for first, last in ranges)
    if count > MAX_SEEDS or max(last for _, last in ranges) > MAX_SEED:
        raise ConfigError(
            f"--seeds takes at most {MAX_SEEDS} seeds of at most {MAX_SEED}, the images of one grid; got {text!r}"
        )
    seeds = [seed for first, last in ranges for seed in range(first, last + 1)]
    if not seeds:
        raise ConfigError(f"--seeds {text!r} names no seed; write the smaller number first")
    return seeds


def run_every_combination(overrides: list[str]) -> None:
    """Run every combination, one after the other in this process, or in parallel with a launcher of this project.

    Runs that cannot succeed end before the first one starts; if none can, for one reason, that is the error.
    """
    from orchestrator.controller import run_pipeline
    from orchestrator.planning.checks.check import check_run
    from orchestrator.run.run_folder import RunFolder
    from orchestrator.sweeps.hydra_entry import run_sweep
    from orchestrator.sweeps.trial import SweepStopped, label_trial, parse_trial_config

    try:
        combinations = run_sweep(overrides)
    except SweepStopped as notice:
        console.print(str(notice), soft_wrap=True, highlight=False)
        raise typer.Exit(INTERRUPTED) from None
    configs, failures = {}, {}
    for composed, parameters in combinations:
        label = label_trial(parameters)
        try:
            config = parse_trial_config(composed, label)
            check_run(config, RunFolder(Path(config.folder).expanduser()))
            configs[label] = config
        except DDMError as error:
            failures[label] = str(error)
    if not configs and len({*failures.values()}) == 1:
        raise ConfigError(failures.popitem()[1])
    for label, message in failures.items():
        console.rule(label)
        console.print(message, style="red", highlight=False, soft_wrap=True)
    for label, config in configs.items():
        console.rule(label)
        try:
            report_result(config, run_pipeline(config, console))
        except DDMError as error:
            console.print(str(error), style="red", highlight=False, soft_wrap=True)
            failures[label] = str(error)
    if failures:
        lines = "".join(f"\n  {label}: {error}" for label, error in failures.items())
        raise RunFailed(f"{len(failures)} run(s) of the sweep failed; run the same command to retry them{lines}")


def report_result(config: Any, result: Any, *, as_json: bool = False) -> None:
    """Write the report, print the scores, or all as JSON; exit with code 130 if the run was stopped."""
    from orchestrator.reporting.results import current_graph, load_score_rows
    from orchestrator.reporting.tables.score_table import score_table
    from orchestrator.run.run_folder import RunFolder

    folder = RunFolder(Path(config.folder).expanduser())
    if not result.stopped and (result.submitted or not folder.report.exists()):
        write_report_of(folder.root)
    rows = load_score_rows(folder, current_graph(folder, config))
    if as_json:
        print_json({"run": folder.root, **asdict(result), "scores": rows, "report": folder.report})
    if result.stopped:
        raise typer.Exit(INTERRUPTED)
    if rows:
        console.print(score_table(rows))
    console.print(f"Report: {folder.report}", soft_wrap=True)


def write_report_of(run: Path) -> Path:
    """Write the report of a run, and return its path."""
    from orchestrator.planning.checks.machine import check_folder

    folder = open_run(run)
    check_folder(folder.root)
    from orchestrator.ui.report import write_report

    return write_report(folder)


def open_run(run: Path) -> Any:
    """Return the folder of a run whose configuration can be read; raises `RunFolderError`."""
    from orchestrator.run.run_folder import RunFolder

    folder = RunFolder(run.expanduser())
    folder.load_config()
    return folder
