"""`ddm experts`: who is in the ensemble of a finished run; take experts out, put them back, add new ones."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orchestrator.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help=__doc__)
console = Console()

RunArgument = Annotated[Path, typer.Argument(help="The run folder, such as runs/demo", metavar="RUN")]
Ensemble = Annotated[
    Path | None, typer.Option(help="An ensemble that an earlier change has made; empty is the run's own")
]
Out = Annotated[Path | None, typer.Option(help="Folder of the new ensemble; empty is one among the run's artifacts")]


@app.command("list")
def listed(run: RunArgument, ensemble: Ensemble = None) -> None:
    """Show every expert: what it stood for, what it is, and whether it is there."""
    pipeline = _base(run, ensemble).load()
    console.print(_table(pipeline))
    _warn(pipeline)


@app.command()
def remove(
    run: RunArgument,
    ids: Annotated[list[int], typer.Argument(help="Ids of the experts that leave", metavar="ID…")],
    ensemble: Ensemble = None,
    out: Out = None,
) -> None:
    """Make an ensemble without some experts; the others share their gates, and the router is not trained again."""
    from orchestrator.cli.membership import remove as removed

    _said(run, removed(_base(run, ensemble), ids, out))


@app.command()
def add(
    run: RunArgument,
    expert: Annotated[Path, typer.Argument(help="The expert's folder, of `python -m experts` or of another run")],
    shards: Annotated[Path | None, typer.Option(help="Its samples, on which its head in the router is trained")] = None,
    place: Annotated[int | None, typer.Option(help="Id of a missing expert whose place it takes")] = None,
    ensemble: Ensemble = None,
    out: Out = None,
) -> None:
    """Make an ensemble with one expert more: in the place of a missing one, or with a new head in the router."""
    from orchestrator.cli.membership import bring_back, codec_is_known, join

    base = _base(run, ensemble)
    if place is not None and shards is None:
        made = bring_back(base, expert, place, out)
    elif shards is not None and place is None:
        made = join(base, expert, shards, out)
    else:
        raise ConfigError(
            "a new expert needs its samples (--shards), for a head in the router; one that takes the place of a "
            f"missing expert needs that place (--place); given: --shards {shards}, --place {place}"
        )
    if not codec_is_known(expert):
        console.print(f"[yellow]Warning:[/] {escape(str(expert))} does not say which codec it was trained with")
    _said(run, made)


def _base(run: Path, ensemble: Path | None) -> Any:
    from orchestrator.cli.membership import BaseEnsemble
    from orchestrator.run.run_folder import RunFolder

    return BaseEnsemble.of(RunFolder(run.expanduser()), ensemble and ensemble.expanduser())


def _said(run: Path, made: Path) -> None:
    from ensemble.pipeline import DDMPipeline

    pipeline = DDMPipeline.from_pretrained(made)
    there = ", ".join(map(str, sorted(pipeline.ensemble.experts)))
    lines = f"{made}: experts {there}\n  ddm sample {run} --ensemble {made}"
    console.print(lines, soft_wrap=True, highlight=False, markup=False)
    _warn(pipeline)


def _warn(pipeline: Any) -> None:
    from ensemble.membership import missing_warning

    if warning := missing_warning(pipeline.ensemble):
        console.print(f"[yellow]Warning:[/] {warning}", soft_wrap=True, highlight=False)


def _table(pipeline: Any) -> Table:
    from ensemble.membership import data_shares

    table = Table(title=f"{pipeline.ensemble.num_experts} expert(s)")
    for heading in ("expert", "share of\nthe data", "network", "parameters", "prediction", "path"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for k, share in enumerate(data_shares(pipeline.ensemble)):
        expert = pipeline.ensemble.experts.get(k)
        facts = ("[red]missing[/]", "", "", "") if expert is None else _facts(getattr(expert, "shared", expert))
        table.add_row(str(k), f"{100 * share:.1f} %", *facts)
    return table


def _facts(expert: Any) -> tuple[str, ...]:
    parameters = sum(parameter.numel() for parameter in expert.model.parameters())
    return type(expert.model).__name__, f"{parameters:,}", expert.prediction, expert.noise_schedule.name
