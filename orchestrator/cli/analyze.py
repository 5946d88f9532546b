"""`ddm audit` and `ddm classify`: find copies of training images, and measure what each expert has learned."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from orchestrator.cli.pipelines import RunArgument
from orchestrator.errors import ConfigError
from orchestrator.reporting.terminal import AsJson, open_console, print_json

console = open_console()

Ensemble = Annotated[Path | None, typer.Option(help="Folder of another ensemble, such as one with fewer experts")]


def audit(
    run: RunArgument,
    row: Annotated[
        str, typer.Option(help="Row of the table of scores, such as sticky, full or monolith; empty is the first")
    ] = "",
    ensemble: Ensemble = None,
    as_json: AsJson = False,
) -> None:
    """Compare samples with their nearest training images, per expert, to find copies."""
    folder = _open_finished(run)
    from orchestrator.reporting.analyses import load_result, run_audit
    from orchestrator.reporting.tables.analysis_tables import audit_tables
    from orchestrator.ui.report import write_report

    if ensemble is not None:
        row = _score_ensemble(folder, ensemble, row)
    with _progress("Comparing with the training set") as on_progress:
        stage = run_audit(folder, row, on_progress)
    result = load_result(folder, stage, "audit.json")
    if as_json:
        print_json(result)
    for table in audit_tables(result):
        console.print(table)
    files = [folder.artifact(stage) / "audit.json", folder.artifact(stage) / "suspects.png", write_report(folder)]
    console.print("\n".join(map(str, files)), soft_wrap=True, highlight=False, markup=False)


def classify(
    run: RunArgument,
    images: Annotated[int, typer.Option(help="Number of held-out images, equal from every cluster", min=1)] = 256,
    draws: Annotated[
        int, typer.Option(help="Pairs of t and noise per image over which the error is averaged", min=1)
    ] = 16,
    eliminate: Annotated[
        float | None, typer.Option(help="Drop a class early that is worse by so many standard errors, such as 3", min=0)
    ] = None,
    ensemble: Ensemble = None,
    as_json: AsJson = False,
) -> None:
    """Classify held-out images by their denoising error, with the ensemble and with each expert alone."""
    folder = _open_finished(run)
    from orchestrator.reporting.analyses import load_result, run_classify
    from orchestrator.reporting.tables.analysis_tables import accuracy_table

    config = folder.load_config()
    if ensemble is not None:
        from orchestrator.cli.membership import with_ensemble

        config = with_ensemble(folder, config, ensemble)
    with _progress("Denoising under every class") as on_progress:
        stage = run_classify(folder, config, images, draws, on_progress, eliminate or None)
    result = load_result(folder, stage, "classify.json")
    if as_json:
        print_json(result)
    console.print(accuracy_table(result))
    console.print(str(folder.artifact(stage) / "classify.json"), soft_wrap=True, highlight=False, markup=False)


def _score_ensemble(run: Any, ensemble: Path, row: str) -> str:
    """Score the ensemble in a folder, unless it is scored, and return its row; raises `ConfigError` for another row."""
    from orchestrator.cli.membership import with_ensemble
    from orchestrator.cli.sample import usable_compute, without_compressions
    from orchestrator.controller import run_pipeline
    from orchestrator.pipeline.graph import FROM_ENSEMBLE

    if row:
        raise ConfigError(f"--ensemble and --row {row} name two sets of samples; leave out one")
    run_pipeline(with_ensemble(run, without_compressions(usable_compute(run)), ensemble), console)
    return FROM_ENSEMBLE


def _open_finished(run: Path) -> Any:
    """Return the folder of a finished run that can be written; raises before anything heavy is imported."""
    from orchestrator.planning.checks.machine import check_folder
    from orchestrator.reporting.results import find_pipeline
    from orchestrator.run.run_folder import RunFolder

    folder = RunFolder(run.expanduser())
    find_pipeline(folder, monolith=False)
    check_folder(folder.root)
    return folder


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on the terminal while the block lasts; yield its update function."""
    with Progress(console=open_console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
