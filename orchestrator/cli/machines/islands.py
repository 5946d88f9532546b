"""Check the islands of a configuration, or start local islands for tests."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from orchestrator.errors import ConfigError, IslandError
from orchestrator.islands.local.processes import FOLDER
from orchestrator.reporting.terminal import AsJson, open_console, print_json

app = typer.Typer(no_args_is_help=True, help=__doc__)
console = open_console()

COLORS = {"ok": "green", "warning": "yellow", "error": "red", "left out": "dim"}

FolderOption = Annotated[Path, typer.Option(help="Folder of the tokens and storages")]


@app.command()
def check(
    overrides: Annotated[list[str] | None, typer.Argument(help="Hydra overrides: compute=my_islands …")] = None,
    timeout: Annotated[float, typer.Option(help="Longest time in seconds for all islands together", min=1)] = 150.0,
    as_json: AsJson = False,
) -> None:
    """Check address, token, versions, clock, resources and storage of every island; exit code 1 on an error."""
    from orchestrator.config.hydra_compose import compose
    from orchestrator.config.schema import parse_config

    islands = parse_config(compose(overrides or [])).compute.islands
    if not islands:
        raise ConfigError(
            "this configuration has no islands; choose a group with islands, such as compute=islands_local"
        )
    from orchestrator.islands.preflight.check import check_islands

    findings = check_islands(islands, timeout)
    if as_json:
        print_json(findings)
    table = Table("island", "check", "", "result", title=f"{len(islands)} island(s)")
    for finding in findings:
        state = Text(finding.state, style=COLORS[finding.state])
        table.add_row(finding.island, finding.check, state, finding.text)
    console.print(table)
    if any(finding.state == "error" for finding in findings):
        raise typer.Exit(1)


@app.command()
def up(
    count: Annotated[int, typer.Option(help="Number of islands", min=1)] = 2,
    cpus: Annotated[int, typer.Option(help="CPUs of each island for stages", min=1)] = 1,
    folder: FolderOption = FOLDER,
) -> None:
    """Start islands on this machine: separate Ray clusters on loopback, until `ddm islands down`."""
    from orchestrator.islands.local.clusters import FIRST_PORT, LocalIslands, write_config

    islands = LocalIslands(folder, count=count, cpus=cpus, first_port=FIRST_PORT).up()
    console.print(write_config(islands.folder, islands.configs), soft_wrap=True, highlight=False, markup=False)


@app.command()
def down(folder: FolderOption = FOLDER) -> None:
    """Kill the islands that `ddm islands up` has started; their storages are kept."""
    from orchestrator.islands.local.processes import take_down

    root = folder.expanduser().resolve()
    if not (ended := take_down(root)):
        raise IslandError(f"no island runs in {root}; if they were started with --folder, pass the same folder")
    console.print(f"{', '.join(ended)} ended; their storages are still in {root}", soft_wrap=True, highlight=False)
