"""`ddm audit` and `ddm classify`: what a finished run copies, and what its experts know."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

console = Console()

RunArgument = Annotated[Path, typer.Argument(help="The run folder, such as runs/demo", metavar="RUN")]


def audit(
    run: RunArgument,
    row: Annotated[str, typer.Option(help="Row of the table of scores: sticky, full, monolith …")] = "",
) -> None:
    """Look for copies: samples beside their nearest training images, for each expert apart."""
    from orchestrator.reporting.analyses import load_result, run_audit
    from orchestrator.reporting.analysis_tables import audit_tables
    from orchestrator.reporting.page import write_report
    from orchestrator.run.run_folder import RunFolder

    folder = RunFolder(run.expanduser())
    with _progress("Comparing with the training set") as on_progress:
        stage = run_audit(folder, row, on_progress)
    for part in audit_tables(load_result(folder, stage, "audit.json")):
        console.print(part)
    places = [folder.artifact(stage) / "audit.json", folder.artifact(stage) / "suspects.png", write_report(folder)]
    console.print("\n".join(map(str, places)), soft_wrap=True, highlight=False, markup=False)


def classify(
    run: RunArgument,
    images: Annotated[int, typer.Option(help="Held-out images in all, as many from every cluster", min=1)] = 256,
    draws: Annotated[int, typer.Option(help="Values of t and noises that an error is averaged over", min=1)] = 16,
) -> None:
    """Classify held-out images by denoising them: what the ensemble knows, and each expert alone."""
    from orchestrator.reporting.analyses import load_result, run_classify
    from orchestrator.reporting.analysis_tables import knowledge_table
    from orchestrator.run.run_folder import RunFolder

    folder = RunFolder(run.expanduser())
    with _progress("Denoising under every class") as on_progress:
        stage = run_classify(folder, images, draws, on_progress)
    console.print(knowledge_table(load_result(folder, stage, "classify.json")))
    console.print(str(folder.artifact(stage) / "classify.json"), soft_wrap=True, highlight=False, markup=False)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal, which goes away when the block ends."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
