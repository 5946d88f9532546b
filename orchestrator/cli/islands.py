"""`ddm islands`: check the islands of a configuration, and start some on this machine to try it with."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orchestrator.errors import ConfigError, IslandError
from orchestrator.islands.local.processes import FOLDER

app = typer.Typer(no_args_is_help=True, help=__doc__)
console = Console()

COLOURS = {"ok": "green", "warning": "yellow", "error": "red", "left out": "dim"}

FolderOption = Annotated[Path, typer.Option(help="Where tokens and storages are kept")]


@app.command()
def check(
    overrides: Annotated[list[str] | None, typer.Argument(help="Hydra overrides: compute=my_islands …")] = None,
    timeout: Annotated[float, typer.Option(help="Longest time in seconds, for all islands together", min=1)] = 150.0,
) -> None:
    """Reach, token, versions, clock, resources and storage of every island; exit code 1 if anything is red."""
    from orchestrator.config.hydra_compose import compose
    from orchestrator.config.schema import parse_config

    islands = parse_config(compose(overrides or [])).compute.islands
    if not islands:
        raise ConfigError("this configuration has no islands; name a group that has, such as compute=islands_local")
    from orchestrator.islands.preflight.check import check_islands

    findings = check_islands(islands, timeout)
    table = Table("island", "check", "", "found", title=f"{len(islands)} island(s)")
    for finding in findings:
        state = f"[{COLOURS[finding.state]}]{finding.state}[/]"
        table.add_row(finding.island, finding.check, state, escape(finding.text))
    console.print(table)
    if any(finding.state == "error" for finding in findings):
        raise typer.Exit(1)


@app.command()
def up(
    count: Annotated[int, typer.Option(help="How many", min=1)] = 2,
    cpus: Annotated[int, typer.Option(help="CPUs that each one gives to stages", min=1)] = 1,
    folder: FolderOption = FOLDER,
) -> None:
    """Start islands on this machine: Ray clusters of their own on loopback, until `ddm islands down`."""
    from orchestrator.islands.local.clusters import FIRST_PORT, LocalIslands, describe

    islands = LocalIslands(folder, count=count, cpus=cpus, first_port=FIRST_PORT).up()
    console.print(describe(islands.folder, islands.configs), soft_wrap=True, highlight=False, markup=False)


@app.command()
def down(folder: FolderOption = FOLDER) -> None:
    """Kill the islands that `ddm islands up` has started; their storages stay."""
    from orchestrator.islands.local.processes import take_down

    place = folder.expanduser().resolve()
    if not (ended := take_down(place)):
        raise IslandError(f"no island runs in {place}; if they were started with --folder, give it here too")
    console.print(f"{', '.join(ended)} ended; what they stored is still in {place}", soft_wrap=True, highlight=False)
