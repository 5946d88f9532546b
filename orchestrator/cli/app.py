"""Train and sample decentralized diffusion models: experts on clusters of a data set, combined by a router.

`plan`, `run` and `submit` take Hydra overrides such as `experiment=demo partition.num_experts=8`.

All other commands take a run folder such as `runs/demo`.
"""
# Every command imports its dependencies when it runs: the parser starts without torch and Ray.

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from orchestrator.cli.analyze import audit, classify
from orchestrator.cli.exits import run_command
from orchestrator.cli.experts import app as experts_app
from orchestrator.cli.experts import extend, finetune
from orchestrator.cli.init import init
from orchestrator.cli.machines.islands import app as islands_app
from orchestrator.cli.machines.pools import app as pool_app
from orchestrator.cli.pipelines import (
    RunArgument,
    complete_stage,
    fit,
    open_run,
    parse_seeds,
    report_result,
    run_every_combination,
    show_next_steps,
    with_file,
    write_report_of,
)
from orchestrator.cli.verify import verify
from orchestrator.errors import ConfigError, RunFolderError
from orchestrator.reporting.terminal import AsJson, open_console, print_json
from orchestrator.serving.command import serve
from orchestrator.ui.command import ui

COMMANDS = (
    "init",
    "plan",
    "run",
    "status",
    "logs",
    "ui",
    "report",
    "sample",
    "serve",
    "stop",
    "resume",
    "evaluate",
    "audit",
    "classify",
    "compress",
    "experts",
    "extend",
    "finetune",
    "verify",
    "submit",
    "islands",
    "pool",
)
"""All commands in the order of use, as `ddm --help` lists them."""


class _OrderedCommands(TyperGroup):
    """Lists the commands in the order of use."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands in the order of use."""
        return sorted(super().list_commands(ctx), key=COMMANDS.index)


app = typer.Typer(
    cls=_OrderedCommands,
    invoke_without_command=True,
    callback=show_next_steps,
    add_completion=True,
    pretty_exceptions_enable=False,
    help=__doc__,
)
app.add_typer(experts_app, name="experts")
app.add_typer(islands_app, name="islands")
app.add_typer(pool_app, name="pool")
app.command()(init)
app.command()(audit)
app.command()(extend)
app.command()(finetune)
app.command()(verify)
app.command()(classify)
app.command()(ui)
app.command()(serve)
console = open_console()

Overrides = Annotated[list[str] | None, typer.Argument(help="Hydra overrides: experiment=demo key=value …")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="A YAML file of keys and values, such as `ddm init` writes")
]
Trust = Annotated[bool, typer.Option("--trust", help="Act on settings that another user wrote, or on another machine")]
Seeds = Annotated[str, typer.Option(help="Seeds of the images: 0-15, or 3,5,8")]
Selection = Annotated[
    str,
    typer.Option(
        help="Selection of experts: sticky, full, top_k, threshold, nucleus, sample, full_then_top1, "
        "threshold_then_top1, full_then_sticky, sticky_resample, coupled_resample; auto is the result of "
        "the run's selection search"
    ),
]


@app.command()
def plan(
    overrides: Overrides = None,
    config_file: ConfigFile = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure the speed here and on islands first")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the stages that would run, with their places, times and prices. Nothing runs."""
    from orchestrator.config.hydra_compose import compose
    from orchestrator.config.schema import parse_config
    from orchestrator.planning.calibration import calibrate as measure
    from orchestrator.planning.plan import plan_run
    from orchestrator.planning.tables import plan_tables
    from orchestrator.run.run_folder import RunFolder

    config = parse_config(compose(fit(with_file(config_file, overrides))))
    if calibrate:
        with open_console(stderr=True).status("Measuring for a few seconds …"):
            measure(config)
    run_plan = plan_run(config, RunFolder(Path(config.folder).expanduser()))
    if as_json:
        print_json(run_plan)
        return
    for table in plan_tables(run_plan):
        console.print(table)


@app.command()
def run(
    overrides: Overrides = None,
    config_file: ConfigFile = None,
    multirun: Annotated[
        bool, typer.Option("--multirun", "-m", help="Run every combination of keys with several values: key=a,b")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the settings of a finished run in this folder; they are archived")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run the whole pipeline: partition, experts, router, monolith, ensemble, scores, report."""
    overrides = with_file(config_file, overrides)
    if multirun and as_json:
        raise ConfigError("--json prints the result of one run; a sweep writes sweep.json and one folder a run")
    if multirun:
        run_every_combination(overrides)
        return
    console.print("Reading the configuration …")
    from orchestrator.cli.replacement import check_replacement
    from orchestrator.config.hydra_compose import compose
    from orchestrator.config.schema import parse_config
    from orchestrator.controller import run_pipeline
    from orchestrator.run.run_folder import RunFolder

    if misplaced := [text for text in overrides if text.startswith(("hydra/launcher", "hydra/sweeper"))]:
        raise ConfigError(f"{misplaced[0]} belongs to a sweep: add -m, and a key with several values")
    config = parse_config(compose(fit(overrides)))
    check_replacement(RunFolder(Path(config.folder).expanduser()), config, replace=replace)
    report_result(config, run_pipeline(config, console), as_json=as_json)


@app.command()
def status(
    run: RunArgument,
    all_experts: Annotated[bool, typer.Option("--all", help="List every expert, however many there are")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Keep the table up to date while the run goes on")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the state and progress of every stage of a run."""
    from orchestrator.reporting.status import load_facts, status_table, watch_status

    folder = open_run(run)
    if as_json:
        print_json(load_facts(folder))
    elif watch:
        watch_status(folder, console, all_experts=all_experts)
    else:
        console.print(status_table(folder, all_experts=all_experts))


@app.command()
def logs(
    run: RunArgument,
    stage: Annotated[
        str,
        typer.Argument(help="The stage, such as expert_3; empty prints the journal", autocompletion=complete_stage),
    ] = "",
    attempt: Annotated[int, typer.Option(help="Attempt number; 0 is the latest", min=0)] = 0,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print new lines until the stage, or the run, has ended")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print a stage's settings, losses, time left and log, or the journal of the run."""
    from orchestrator.reporting.status import describe_stage, find_log_file, has_ended, load_stage_facts, print_file

    folder = open_run(run)
    file = find_log_file(folder, stage, attempt)
    if as_json:
        print_json(load_stage_facts(folder, stage, file.parent) if stage else folder.read_events())
        return
    if stage:
        typer.echo(describe_stage(folder, stage, file.parent))
    attempt_folder = file.parent if stage else None
    print_file(file, (lambda: has_ended(folder, attempt_folder)) if follow else lambda: True)


@app.command()
def stop(run: RunArgument) -> None:
    """Stop a run after its stages have saved their work; `ddm resume` continues it."""
    from orchestrator.run.lease import read_holder

    folder = open_run(run)
    controller = read_holder(folder)
    if controller is None:
        raise RunFolderError(f"{run} has no controller: nothing is running")
    if not controller.is_alive:
        raise RunFolderError(f"the controller of {run}, {controller}, is dead; continue with `ddm resume {run}`")
    folder.request_stop()
    console.print(f"Stop requested for {run}; continue with `ddm resume {run}`.", soft_wrap=True)


@app.command()
def resume(
    run: RunArgument,
    trust: Trust = False,
    budget_cost: Annotated[
        float | None, typer.Option(help="A new compute.budget_cost, in the currency of your islands' prices")
    ] = None,
    budget_hours: Annotated[float | None, typer.Option(help="A new compute.budget_hours, in worker hours")] = None,
    as_json: AsJson = False,
) -> None:
    """Continue a run that was stopped or killed. Finished stages are kept."""
    from dataclasses import replace

    from ddm_core.artifacts import to_jsonable
    from orchestrator.config.schema import parse_config
    from orchestrator.controller import run_pipeline
    from orchestrator.run.trust import require_trust

    folder = open_run(run)
    config = replace(folder.load_config(), folder=str(run))
    require_trust(folder, config, trust=trust)
    budgets = {"budget_cost": budget_cost, "budget_hours": budget_hours}
    if changed := {key: value for key, value in budgets.items() if value is not None}:
        settings = to_jsonable(config)
        config = parse_config(settings | {"compute": settings["compute"] | changed})
    report_result(config, run_pipeline(config, console), as_json=as_json)


@app.command()
def sample(  # noqa: PLR0913 - one for each option
    run: RunArgument,
    seeds: Seeds = "0-15",
    label: Annotated[str, typer.Option(help="Class by name or number; empty samples without a class")] = "",
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text of the images; several give a grid with one row a prompt")
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="Text that guidance leads away from")] = "",
    selection: Selection = "",
    out: Annotated[Path, typer.Option(help="The image file to write")] = Path("grid.png"),
    steps: Annotated[int | None, typer.Option(help="Solver steps; empty uses the run's", min=1)] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 means none; empty uses the run's", min=0)] = None,
    monolith: Annotated[bool, typer.Option("--monolith", help="Sample from the monolith baseline")] = False,
    ensemble: Annotated[Path | None, typer.Option(help="Sample from an ensemble that `ddm experts` wrote")] = None,
    reflect: Annotated[
        int | None, typer.Option(help="Solver steps to reflect from weak to strong; more than there are: all", min=1)
    ] = None,
    size: Annotated[str, typer.Option(help="Width x height, such as 48x32, for networks that take any size")] = "",
    as_json: AsJson = False,
) -> None:
    """Sample images from a finished run and write them as one grid."""
    from orchestrator.cli.sample import SamplingOptions, describe_samples, prepare_sampling, save_grid

    folder, seed_list = open_run(run), parse_seeds(seeds)
    if monolith and selection:
        raise ConfigError("--monolith is one model, so there is nothing to select: leave out --selection")
    if monolith and reflect:
        raise ConfigError("--reflect uses the monolith as the weak model of the ensemble: leave out one of the two")
    if monolith and ensemble:
        raise ConfigError(f"--monolith and --ensemble {ensemble} are two models: leave out one")
    options = SamplingOptions(
        label=label,
        prompts=tuple(prompt or ()),
        negative_prompt=negative_prompt,
        selection=selection,
        steps=steps,
        guidance_scale=guidance_scale,
        monolith=monolith,
        ensemble=ensemble,
        size=size,
        reflect=reflect,
    )
    request = prepare_sampling(folder, out, options)
    samples = request.sample(seed_list)
    console.print(save_grid(request, samples, out), soft_wrap=True)
    if as_json:
        print_json(describe_samples(request, samples, seed_list, out))


@app.command()
def evaluate(
    run: RunArgument,
    selection: Selection = "sticky",
    ensemble: Annotated[
        Path | None, typer.Option(help="Score another ensemble, such as one with fewer experts")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score a finished run with another selection, or another ensemble with the selections of the run."""
    from orchestrator.cli.sample import with_selection, without_compressions
    from orchestrator.controller import run_pipeline

    folder = open_run(run)
    config = with_selection(folder, selection)
    if ensemble is not None:
        from orchestrator.cli.membership import with_ensemble

        config = with_ensemble(folder, without_compressions(config), ensemble)
    report_result(config, run_pipeline(config, console), as_json=as_json)


@app.command()
def compress(
    run: RunArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="distill=sid …, accelerate=cache …, prune=laptop …, quantize=int4_weight_only quantize.group_size=32 …"
        ),
    ] = None,
    budget: Annotated[
        str, typer.Option(help="Search for a compression instead: bytes<=0.25,kid<=1.05 (also flops, cpu, fd, l2)")
    ] = "",
    ensemble: Annotated[
        Path | None, typer.Option(help="Compress the ensemble in this folder, such as one with fewer experts")
    ] = None,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Make a smaller or faster ensemble and score it. The original ensemble is kept."""
    from orchestrator.reporting.results import find_pipeline
    from orchestrator.run.trust import require_trust

    if budget and ensemble:
        raise ConfigError("--budget compresses the run's own ensemble; leave out either --ensemble or --budget")
    if budget and overrides:
        raise ConfigError("--budget searches for the stages itself; leave out either the stages or --budget")
    folder = open_run(run)
    require_trust(folder, folder.load_config(), trust=trust)
    find_pipeline(folder, monolith=False)
    from orchestrator.cli.compress import compress_run, describe_compression, search_run, start_from, with_compression
    from orchestrator.pipeline.graph import build_graph
    from orchestrator.reporting.pareto import load_compression_points

    if budget:
        config = search_run(folder, budget, console)
    else:
        compressed = with_compression(folder.load_config(), overrides or [])
        config = compress_run(folder, start_from(folder, compressed, ensemble), console)
    console.print(f"Report: {write_report_of(run)}", soft_wrap=True)
    console.print(describe_compression(folder, config), soft_wrap=True, highlight=False, markup=False)
    if as_json:
        print_json(load_compression_points(folder, build_graph(config)))


@app.command()
def report(run: RunArgument, as_json: AsJson = False) -> None:
    """Write the HTML report of a run again."""
    page = write_report_of(run)
    console.print(f"Report: {page}", soft_wrap=True)
    if as_json:
        print_json({"report": page})


@app.command()
def submit(
    address: Annotated[str, typer.Option(help="The Ray cluster's dashboard, such as http://127.0.0.1:8265")],
    token_file: Annotated[str, typer.Option(help="File with its token, mode 600")],
    overrides: Overrides = None,
    config_file: ConfigFile = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the job has opened the run folder")] = False,
    as_json: AsJson = False,
) -> None:
    """Run the controller as a job on a Ray cluster that shares the run folder's disk, and return at once."""
    from orchestrator.cli.submit import JOB_START_S, resolve_submission, submit_run, wait_until_started
    from orchestrator.config.hydra_compose import compose
    from orchestrator.config.schema import parse_config

    config, client = resolve_submission(
        parse_config(compose(fit(with_file(config_file, overrides)))), address, token_file
    )
    submission = submit_run(config, client)
    if submission.previous_failure:
        console.print(f"The previous controller failed: {submission.previous_failure}", highlight=False)
    if wait:
        wait_until_started(submission, client, JOB_START_S)
    if as_json:
        print_json(submission)
    result = (
        f"Submitted {submission.id} to {address}"
        if submission.is_new
        else f"{submission.id} already runs this run; nothing was submitted"
    )
    commands = [f"  ddm {command} {submission.folder}" for command in ("status", "logs", "stop", "resume")]
    console.print("\n".join([result, *commands]), soft_wrap=True, highlight=False)


def main() -> None:
    """Run the command; an error becomes one message and exit code 1."""
    sys.exit(run_command(app))
