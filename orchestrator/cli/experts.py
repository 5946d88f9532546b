"""List, remove, restore or add the experts of a finished run's ensemble."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from orchestrator.errors import ConfigError
from orchestrator.reporting.terminal import open_console

app = typer.Typer(no_args_is_help=True, help=__doc__)
console = open_console()

RunArgument = Annotated[Path, typer.Argument(help="The run folder, such as runs/demo", metavar="RUN")]
Ensemble = Annotated[Path | None, typer.Option(help="Ensemble of an earlier change; empty is the run's own")]
Out = Annotated[
    Path | None, typer.Option(help="Folder of the new ensemble; empty is a new folder among the run's artifacts")
]


@app.command("list")
def list_experts(run: RunArgument, ensemble: Ensemble = None) -> None:
    """Show every expert: its share of the data, its network, and whether it is missing."""
    pipeline = _open_base(run, ensemble).load()
    console.print(_table(pipeline))
    _warn(pipeline)


@app.command()
def remove(
    run: RunArgument,
    ids: Annotated[list[int], typer.Argument(help="Ids of the experts to remove", metavar="ID…")],
    ensemble: Ensemble = None,
    out: Out = None,
) -> None:
    """Write an ensemble without some experts; gates are renormalized, and the router is not trained again."""
    base = _open_base(run, ensemble, out or run)
    from orchestrator.cli.membership import write_without_experts

    _print_ensemble(run, write_without_experts(base, ids, out))


@app.command()
def add(
    run: RunArgument,
    expert: Annotated[Path, typer.Argument(help="The expert's folder, written by `python -m experts` or another run")],
    shards: Annotated[Path | None, typer.Option(help="Its training samples, for its new head in the router")] = None,
    place: Annotated[int | None, typer.Option(help="Id of a missing expert that it replaces")] = None,
    ensemble: Ensemble = None,
    out: Out = None,
) -> None:
    """Write an ensemble with one more expert: as a missing id (--place) or with a new router head (--shards)."""
    base = _open_base(run, ensemble, out or run)
    from orchestrator.cli.membership import records_codec, write_with_new_expert, write_with_restored_expert

    if place is not None and shards is None:
        folder = write_with_restored_expert(base, expert, place, out)
    elif shards is not None and place is None:
        folder = write_with_new_expert(base, expert, shards, out)
    else:
        raise ConfigError(
            "a new expert needs its samples (--shards) for a head in the router, or the id of the missing expert "
            f"that it replaces (--place), and not both; got --shards {shards}, --place {place}"
        )
    if not records_codec(expert):
        console.print(f"Warning: {expert} does not record the codec with which it was trained")
    _print_ensemble(run, folder)


def finetune(
    run: RunArgument,
    images: Annotated[Path, typer.Option(help="Folder of images, as data.source=image_folder reads it")],
    out: Annotated[Path, typer.Option(help="Folder of the adapters; what is finished in it is kept")],
    experts: Annotated[str, typer.Option(help="all, ids such as 0,2, or routed: by each image's cluster")] = "routed",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each adapter")] = 500,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step")] = 16,
    lr: Annotated[float, typer.Option(min=0, help="Peak learning rate")] = 1e-4,
) -> None:
    """Train a LoRA adapter of every chosen expert on images, each expert alone; the run stays as it is."""
    from orchestrator.cli.sample import find_pipeline
    from orchestrator.pipeline import run_finetune
    from orchestrator.reporting.results import current_graph
    from orchestrator.run.run_folder import RunFolder

    folder, out = RunFolder(run.expanduser()), out.expanduser()
    config, ensemble = folder.load_config(), find_pipeline(folder, monolith=False)
    partition = next(stage for stage in current_graph(folder, config) if stage.name == "partition")
    training = replace(
        config.expert.training, steps=steps, batch_size=batch_size, lr=lr, warmup_steps=min(100, steps // 10)
    )
    request = run_finetune.FinetuneRequest(
        config=config,
        ensemble=ensemble,
        partition=folder.artifact(partition),
        images=images.expanduser(),
        out=out,
        experts=experts,
        training=training,
        rank=rank,
    )
    for k, summary in run_finetune.finetune(request):
        console.print(f"expert {k}: {summary.images} images, {summary.steps} steps, loss {summary.final_loss:.4f}")
    console.print(f'{out}: pipe.load_lora_weights("{out}")', soft_wrap=True, highlight=False, markup=False)


def _open_base(run: Path, ensemble: Path | None, output: Path | None = None) -> Any:
    """Return an ensemble after its checksums are verified, if a folder can be written at `output`."""
    from orchestrator.planning.checks.check import check_folder
    from orchestrator.run.run_folder import RunFolder

    folder = RunFolder(run.expanduser())
    folder.load_config()
    if output is not None:
        check_folder(output.expanduser())
    from orchestrator.cli.membership import BaseEnsemble

    return BaseEnsemble.open(folder, ensemble and ensemble.expanduser())


def _print_ensemble(run: Path, folder: Path) -> None:
    from ensemble.pipeline import EnsemblePipeline

    pipeline = EnsemblePipeline.from_pretrained(folder)
    present = ", ".join(map(str, sorted(pipeline.ensemble.experts)))
    lines = f"{folder}: experts {present}\n  ddm sample {run} --ensemble {folder}"
    console.print(lines, soft_wrap=True, highlight=False, markup=False)
    _warn(pipeline)


def _warn(pipeline: Any) -> None:
    from ensemble.membership import missing_warning

    if warning := missing_warning(pipeline.ensemble):
        console.print(f"Warning: {warning}", soft_wrap=True, highlight=False)


def _table(pipeline: Any) -> Table:
    from ensemble.membership import data_shares

    table = Table(title=f"{pipeline.ensemble.num_experts} expert(s)")
    for heading in ("expert", "share of\nthe data", "network", "parameters", "prediction", "noise\nschedule"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for k, share in enumerate(data_shares(pipeline.ensemble)):
        expert = pipeline.ensemble.experts.get(k)
        facts = ("missing", "", "", "") if expert is None else _facts(getattr(expert, "shared", expert))
        table.add_row(str(k), f"{100 * share:.1f} %", *facts)
    return table


def _facts(expert: Any) -> tuple[str, ...]:
    from experts.training.flops import count_parameters

    return (
        type(expert.model).__name__,
        f"{count_parameters(expert.model):,}",
        expert.prediction,
        expert.noise_schedule.name,
    )
