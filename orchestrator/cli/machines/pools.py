"""`ddm pool render|up|down`; every command imports its dependencies when it runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.reporting.terminal import AsJson, open_console, print_json

if TYPE_CHECKING:
    from orchestrator.pools.config import PoolConfig

app = typer.Typer(
    no_args_is_help=True,
    help="Start and end pools of cloud nodes that scale with the waiting stages; see docs/pools.md.",
)
console = open_console()

Pool = Annotated[
    str, typer.Argument(help="aws_spot, gcp_spot, kuberay, skypilot, local, or a YAML file", metavar="POOL")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, such as nodes.l4_spot.max_nodes=4")]
Folder = Annotated[Path | None, typer.Option(help="The pool's folder; empty is ~/.ddm/pools/NAME")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Skip the confirmation")]


@app.command("render")
def render_pool(
    pool: Pool,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the files; empty prints them")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the configuration files for the provider's tool. Nothing starts."""
    from orchestrator.pools.lifecycle import write_files
    from orchestrator.pools.render import render

    config = _load_config(pool, overrides)
    if as_json:
        print_json(render(config))
        return
    if out is not None:
        for path in write_files(config, out):
            console.print(str(path), soft_wrap=True, highlight=False)
        return
    for name, text in render(config).items():
        typer.echo(f"# {name}\n{text}")


@app.command("up")
def start_pool(pool: Pool, overrides: Overrides = None, folder: Folder = None, yes: Yes = False) -> None:
    """Start a pool, after a confirmation of its maximum cost per hour. Nodes start when stages wait."""
    from orchestrator.pools import lifecycle

    config = _load_config(pool, overrides)
    pool_folder = _pool_folder(config.name, folder)
    lifecycle.check(config, pool_folder)
    console.print(_describe_cost(config), soft_wrap=True, highlight=False)
    if not yes:
        typer.confirm(f"Start pool {config.name}?", abort=True)
    lifecycle.up(config, pool_folder)
    islands_file = pool_folder / "islands.yaml"
    islands = islands_file.read_text(encoding="utf-8")
    console.print(f"Pool {config.name} is up. Its islands, for the key `compute` ({islands_file}):")
    typer.echo(islands)
    console.print(
        f"End it with `ddm pool down {_command_arguments(config.name, folder)}`.", soft_wrap=True, highlight=False
    )


@app.command("down")
def end_pool(
    name: Annotated[str, typer.Argument(help="The pool's name", metavar="NAME")],
    folder: Folder = None,
    yes: Yes = False,
) -> None:
    """End a pool with everything that runs on it, and check that it is gone."""
    from orchestrator.pools import lifecycle

    pool_folder = _pool_folder(name, folder)
    config = lifecycle.load_started_pool(pool_folder)
    if not yes:
        typer.confirm(f"End pool {config.name} and every job on it?", abort=True)
    lifecycle.down(config, pool_folder)
    console.print(
        f"Pool {config.name} is gone; its storage {config.storage_url} is kept.", soft_wrap=True, highlight=False
    )


def _load_config(pool: str, overrides: list[str] | None) -> "PoolConfig":
    from orchestrator.config.hydra_compose import config_folder
    from orchestrator.pools.load_config import load_pool

    return load_pool(Path(config_folder()) / "pool", pool, overrides or [])


def _pool_folder(name: str, folder: Path | None) -> Path:
    return (folder or Path("~/.ddm/pools") / name).expanduser().absolute()


def _command_arguments(name: str, folder: Path | None) -> str:
    return name if folder is None else f"{name} --folder {folder}"


def _describe_cost(config: "PoolConfig") -> str:
    """Return the maximum cost per hour and its parts, without storage and traffic."""
    parts = [f"head {config.head.price_per_hour:g}"]
    parts += [f"{name} {node.max_nodes} × {node.price_per_hour:g}" for name, node in config.nodes.items()]
    if config.provider == "local":
        return f"Pool {config.name} runs as processes on this machine and costs nothing."
    if unpriced := [name for name, node in config.nodes.items() if node.max_nodes and not node.price_per_hour]:
        return f"The cost of pool {config.name} is unknown: no price_per_hour for {', '.join(unpriced)}."
    idle = config.head.price_per_hour + sum(node.min_nodes * node.price_per_hour for node in config.nodes.values())
    return (
        f"Pool {config.name} on {config.provider}: at most {config.max_cost_per_hour:.2f} an hour "
        f"({', '.join(parts)}), {idle:.2f} while idle; disks and traffic are extra."
    )
