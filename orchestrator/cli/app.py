"""The command `ddm`: parse first, import what is heavy afterwards.

`run` and `plan` take Hydra overrides such as `experiment=demo partition.num_experts=8`; all other commands take a
run folder.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from orchestrator.cli.analyze import audit, classify
from orchestrator.cli.experts import app as experts_app
from orchestrator.cli.islands import app as islands_app
from orchestrator.cli.pools import app as pool_app
from orchestrator.errors import ConfigError, OrchestratorError, RunFailed, RunFolderError

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(experts_app, name="experts")
app.add_typer(islands_app, name="islands")
app.add_typer(pool_app, name="pool")
app.command()(audit)
app.command()(classify)
console = Console()

Overrides = Annotated[list[str] | None, typer.Argument(help="Hydra overrides: experiment=demo key=value …")]
RunArgument = Annotated[Path, typer.Argument(help="The run folder, such as runs/demo", metavar="RUN")]
Seeds = Annotated[str, typer.Option(help="Seeds of the images: 0-15, or 3,5,8")]
Select = Annotated[
    str,
    typer.Option(
        help="Selection: sticky, sticky_at, redraw, coupled, sample, switch, anneal, threshold, nucleus, top_k, full; "
        "auto is the one that the run has chosen"
    ),
]


@app.command()
def run(
    overrides: Overrides = None,
    multirun: Annotated[bool, typer.Option("--multirun", "-m", help="Sweep: key=a,b runs every combination")] = False,
) -> None:
    """Run the whole pipeline: partition, experts, router, monolith, ensemble, scores, report."""
    if multirun:
        _sweep(overrides or [])
        return
    from orchestrator.config.hydra_compose import compose
    from orchestrator.config.schema import parse_config

    if misplaced := [text for text in overrides or [] if text.startswith(("hydra/launcher", "hydra/sweeper"))]:
        raise ConfigError(f"{misplaced[0]} belongs to a sweep: add -m, and a key with several values")
    _run(parse_config(compose(overrides or [])))


@app.command()
def plan(
    overrides: Overrides = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="First measure speeds, here and on islands")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON")] = False,
) -> None:
    """Show what would run, where, for how long and at what price; runs nothing."""
    from orchestrator.config.hydra_compose import compose
    from orchestrator.config.schema import parse_config
    from orchestrator.planning.calibration import calibrate as measure
    from orchestrator.planning.plan import as_json as plan_json
    from orchestrator.planning.plan import plan as planned
    from orchestrator.planning.tables import plan_tables
    from orchestrator.run.run_folder import RunFolder

    config = parse_config(compose(overrides or []))
    if calibrate:
        with Console(stderr=True).status("Measuring for a few seconds …"):
            measure(config)
    found = planned(config, RunFolder(Path(config.folder).expanduser()))
    if as_json:
        typer.echo(plan_json(found))
        return
    for part in plan_tables(found):
        console.print(part)


@app.command()
def submit(
    address: Annotated[str, typer.Option(help="The Ray cluster's dashboard, such as http://127.0.0.1:8265")],
    token_file: Annotated[str, typer.Option(help="File with its token, mode 600")],
    overrides: Overrides = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until its job has found the run folder")] = False,
) -> None:
    """Put the controller itself onto a Ray cluster that sees the run folder, and return at once."""
    from orchestrator.cli.submit import SEEN_AFTER_S, reachable_from, submit_run, wait_until_seen
    from orchestrator.config.hydra_compose import compose
    from orchestrator.config.schema import parse_config

    config, client = reachable_from(parse_config(compose(overrides or [])), address, token_file)
    sent = submit_run(config, client)
    if sent.earlier:
        console.print(f"Before it, {escape(sent.earlier)}", highlight=False)
    if wait:
        wait_until_seen(sent, client, SEEN_AFTER_S)
    said = f"Submitted {sent.id} to {address}" if sent.is_new else f"{sent.id} walks this run already; nothing was sent"
    commands = [f"  ddm {word} {sent.folder}" for word in ("status", "logs", "stop", "resume")]
    console.print("\n".join([said, *commands]), soft_wrap=True, highlight=False)


@app.command()
def status(run: RunArgument) -> None:
    """Show how far every stage of a run is."""
    from orchestrator.reporting.status import status_table

    console.print(status_table(_opened(run)))


@app.command()
def logs(
    run: RunArgument,
    stage: Annotated[str, typer.Argument(help="The stage, such as expert_3; empty for the journal")] = "",
    attempt: Annotated[int, typer.Option(help="Attempt number; 0 is the latest")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on printing what is added")] = False,
) -> None:
    """Print the log of a stage's attempt, or the journal of the run."""
    from orchestrator.reporting.status import log_file, print_file

    print_file(log_file(_opened(run), stage, attempt), follow=follow)


@app.command()
def stop(run: RunArgument) -> None:
    """Ask a run to save its work and stop; `ddm resume` goes on."""
    folder = _opened(run)
    if not folder.lease.exists():
        raise RunFolderError(f"{run} has no controller: nothing is running")
    folder.stop.touch()
    console.print(f"Asked {run} to stop; go on with `ddm resume {run}`.")


@app.command()
def resume(run: RunArgument) -> None:
    """Go on with a run that was stopped or killed; finished stages are kept."""
    from dataclasses import replace

    _run(replace(_opened(run).load_config(), folder=str(run)))


@app.command()
def sample(
    run: RunArgument,
    seeds: Seeds = "0-15",
    label: Annotated[str, typer.Option(help="Class by name or number; empty draws without a condition")] = "",
    select: Select = "",
    out: Annotated[Path, typer.Option(help="The picture to write")] = Path("grid.png"),
    steps: Annotated[int | None, typer.Option(help="Solver steps; empty takes the run's", min=1)] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 means none; empty takes the run's", min=0)] = None,
    monolith: Annotated[bool, typer.Option("--monolith", help="Draw from the baseline instead")] = False,
    ensemble: Annotated[Path | None, typer.Option(help="Draw from an ensemble that `ddm experts` has made")] = None,
) -> None:
    """Draw images from a finished run into one picture."""
    from orchestrator.cli.sample import sample_run

    folder = _opened(run)
    if monolith and select:
        raise ConfigError("--monolith is one model, so there is nothing to select: leave out --select")
    if monolith and ensemble:
        raise ConfigError(f"--monolith and --ensemble {ensemble} are two models: leave out one")
    chosen = (parse_seeds(seeds), label, select, out, steps, guidance_scale)
    drawn = sample_run(folder, *chosen, monolith=monolith, ensemble=ensemble)
    console.print(drawn, soft_wrap=True)


@app.command()
def evaluate(run: RunArgument, select: Select = "sticky") -> None:
    """Score a finished run with one more selection."""
    from dataclasses import replace

    from orchestrator.cli.sample import pipeline_folder, selection_named

    folder = _opened(run)
    config = folder.load_config()
    pipeline_folder(folder, monolith=False)
    selections = tuple(dict.fromkeys((*config.scores.selections, selection_named(select, config))))
    _run(replace(config, folder=str(run), scores=replace(config.scores, selections=selections)))


@app.command()
def compress(
    run: RunArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="distill=sid …, accelerate=cache …, prune=laptop …, quantize=int4_weight_only, quantize.group_size=32 …"
        ),
    ] = None,
    budget: Annotated[
        str, typer.Option(help="Search for a compression instead: bytes<=0.25,kid<=1.05 (also flops, cpu, fd, l2)")
    ] = "",
) -> None:
    """Make a smaller or faster ensemble beside the whole one, which stays as it is, and score it."""
    from orchestrator.cli.compress import compress_run, describe_compression, search_run, with_compression

    if budget and overrides:
        raise ConfigError("--budget searches for the stages itself; leave them out, or leave it out")
    folder = _opened(run)
    if budget:
        config = search_run(folder, budget, console)
    else:
        config = compress_run(folder, with_compression(folder.load_config(), overrides or []), console)
    console.print(f"Report: {_write_report(run)}", soft_wrap=True)
    console.print(describe_compression(folder, config), soft_wrap=True, highlight=False, markup=False)


@app.command()
def report(run: RunArgument) -> None:
    """Write the report of a run again."""
    console.print(f"Report: {_write_report(run)}")


def parse_seeds(text: str) -> list[int]:
    """`0-15` or `3,5,8` or both as a list; raises `ConfigError` for anything else."""
    try:
        seeds: list[int] = []
        for part in text.split(","):
            first, _, last = part.strip().partition("-")
            seeds += range(int(first), int(last or first) + 1)
    except ValueError:
        raise ConfigError(f"--seeds takes numbers and ranges such as 0-15 or 3,5,8; given: {text!r}") from None
    if not seeds:
        raise ConfigError(f"--seeds {text!r} names no seed; write the smaller number first")
    return seeds


def _sweep(overrides: list[str]) -> None:
    """Every combination, one after the other in this process; with a launcher of ours, at once and elsewhere."""
    from data_partition.errors import DataError
    from ddm_core.artifacts import ArtifactError
    from orchestrator.sweeps.hydra_entry import sweep
    from orchestrator.sweeps.trial import SweepStopped, trial_config, trial_label

    failures: dict[str, str] = {}
    stopped: list[str] = []

    def job(composed: dict[str, Any], parameters: dict[str, str]) -> None:
        if stopped:
            return  # Hydra calls for every trial, whatever came of those before
        label = trial_label(parameters)
        console.rule(label)
        try:
            _run(trial_config(composed, label))
        except typer.Exit:
            stopped.append(label)
        except (OrchestratorError, ArtifactError, DataError) as error:
            console.print(escape(str(error)), style="red", highlight=False, soft_wrap=True)
            failures[label] = str(error)

    try:
        sweep(overrides, job)
    except SweepStopped as notice:
        console.print(escape(str(notice)), soft_wrap=True, highlight=False)
        raise typer.Exit(130) from None
    if stopped:
        raise typer.Exit(130)
    if failures:
        lines = "".join(f"\n  {label}: {error}" for label, error in failures.items())
        raise RunFailed(f"{len(failures)} run(s) of the sweep failed; the same command tries them again{lines}")


def _run(config: Any) -> None:
    from orchestrator.controller import run_pipeline
    from orchestrator.reporting.results import current_graph, score_rows, score_table
    from orchestrator.run.run_folder import RunFolder

    folder = RunFolder(Path(config.folder).expanduser())
    result = run_pipeline(config, console)
    if result.stopped:
        raise typer.Exit(130)
    if result.submitted or not folder.report.exists():
        _write_report(folder.root)
    if rows := score_rows(folder, current_graph(folder, config)):
        console.print(score_table(rows))
    console.print(f"Report: {folder.report}", soft_wrap=True)


def _write_report(run: Path) -> Path:
    from orchestrator.reporting.page import write_report

    return write_report(_opened(run))


def _opened(run: Path) -> Any:
    from orchestrator.run.run_folder import RunFolder

    folder = RunFolder(run.expanduser())
    folder.load_config()
    return folder


def main() -> None:
    """Run the command; errors that a user can mend are one message and exit code 1."""
    from data_partition.errors import DataError
    from ddm_core.artifacts import ArtifactError

    try:
        app()
    except (OrchestratorError, ArtifactError, DataError) as error:
        console.print(f"[red]Error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(1)
