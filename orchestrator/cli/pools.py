"""`ddm pool render|up|down`: parse first, import what is heavy afterwards."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from orchestrator.pools.config import PoolConfig

app = typer.Typer(no_args_is_help=True, help="Pools of nodes that exist while they are needed: see docs/pools.md.")
console = Console()

Pool = Annotated[
    str, typer.Argument(help="aws_spot, gcp_spot, kuberay, skypilot, local, or a YAML file", metavar="POOL")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, such as nodes.l4_spot.max_nodes=4")]
Folder = Annotated[Path | None, typer.Option(help="The pool's folder; empty is its name below ~/.ddm/pools")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask")]


@app.command("render")
def render_pool(
    pool: Pool,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Write the files there; empty prints them")] = None,
) -> None:
    """Show what the provider's tool would be told; starts nothing."""
    from orchestrator.pools.lifecycle import write_files
    from orchestrator.pools.render import render

    config = _composed(pool, overrides)
    if out is not None:
        for path in write_files(config, out):
            console.print(str(path), soft_wrap=True, highlight=False)
        return
    for name, text in render(config).items():
        typer.echo(f"# {name}\n{text}")


@app.command("up")
def start_pool(pool: Pool, overrides: Overrides = None, folder: Folder = None, yes: Yes = False) -> None:
    """Start a pool, after saying what it costs an hour at most; nodes come when stages wait."""
    from orchestrator.pools import lifecycle

    config = _composed(pool, overrides)
    where = _folder(config.name, folder)
    lifecycle.check(config, where)
    console.print(_cost(config), soft_wrap=True, highlight=False)
    if not yes:
        typer.confirm(f"Start pool {config.name}?", abort=True)
    lifecycle.up(config, where)
    islands = (where / "islands.yaml").read_text(encoding="utf-8")
    console.print(f"Pool {config.name} is up. As islands, to put below `compute` ({where / 'islands.yaml'}):")
    typer.echo(islands)
    console.print(f"End it with `ddm pool down {_named(config.name, folder)}`.", soft_wrap=True, highlight=False)


@app.command("down")
def end_pool(
    name: Annotated[str, typer.Argument(help="The pool's name", metavar="NAME")],
    folder: Folder = None,
    yes: Yes = False,
) -> None:
    """End a pool with everything that runs on it, and look whether it is gone."""
    from orchestrator.pools import lifecycle

    where = _folder(name, folder)
    config = lifecycle.is_started(where)
    if not yes:
        typer.confirm(f"End pool {config.name} and every job on it?", abort=True)
    lifecycle.down(config, where)
    console.print(f"Pool {config.name} is gone; its storage {config.stored} is kept.", soft_wrap=True, highlight=False)


def _composed(pool: str, overrides: list[str] | None) -> "PoolConfig":
    from orchestrator.config.hydra_compose import config_folder
    from orchestrator.pools.load_config import pool_config

    return pool_config(Path(config_folder()) / "pool", pool, overrides or [])


def _folder(name: str, given: Path | None) -> Path:
    return (given or Path("~/.ddm/pools") / name).expanduser().absolute()


def _named(name: str, folder: Path | None) -> str:
    return name if folder is None else f"{name} --folder {folder}"


def _cost(config: "PoolConfig") -> str:
    """What it costs at most, and how that comes about; the token and storage are not counted."""
    parts = [f"head {config.head.price_per_hour:g}"]
    parts += [f"{name} {node.max_nodes} × {node.price_per_hour:g}" for name, node in config.nodes.items()]
    if config.provider == "local":
        return f"Pool {config.name} is processes on this machine and costs nothing."
    if free := [name for name, node in config.nodes.items() if node.max_nodes and not node.price_per_hour]:
        return f"What pool {config.name} costs is unknown: no price_per_hour for {', '.join(free)}."
    idle = config.head.price_per_hour + sum(node.min_nodes * node.price_per_hour for node in config.nodes.values())
    return (
        f"Pool {config.name} on {config.provider}: at most {config.most_per_hour:.2f} an hour ({', '.join(parts)}), "
        f"{idle:.2f} while idle; disks and traffic come on top."
    )
