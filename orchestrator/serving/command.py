"""`ddm serve`: answer HTTP requests for images of finished runs, until it is interrupted."""

import socket
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.errors import ConfigError
from orchestrator.reporting.terminal import open_console

console = open_console()


def serve(  # noqa: PLR0913 - the options of a command
    models: Annotated[
        list[str], typer.Argument(help="Finished runs, or folders of ensembles", metavar="RUN|FOLDER|NAME=FOLDER …")
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="LoRA of `ddm finetune`, or a safetensors file", metavar="[MODEL:]NAME=FOLDER"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need --keys")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one", min=0, max=65535)] = 8000,
    keys: Annotated[Path | None, typer.Option(help="File of mode 600 with one API key a line")] = None,
    resident: Annotated[int | None, typer.Option(help="Experts in memory of a replica; empty is all", min=1)] = None,
    max_batch: Annotated[int, typer.Option(help="Images of a batch", min=1, max=256)] = 16,
    queue: Annotated[int, typer.Option(help="Images that wait or are sampled; more get 429", min=1)] = 64,
    max_images: Annotated[int, typer.Option(help="Images of one request", min=1)] = 16,
    max_steps: Annotated[int, typer.Option(help="Solver steps of one request", min=1)] = 100,
    deadline: Annotated[float, typer.Option(help="Seconds until a request is dropped", min=0.1)] = 120.0,
    threads: Annotated[int, typer.Option(help="Threads of a replica", min=1)] = 1,
    replicas: Annotated[str, typer.Option(help="Replicas that sample, by load: 1, or 0-4")] = "1",
    address: Annotated[
        str | None, typer.Option(help="Running Ray cluster of this machine, HOST:PORT or auto; empty starts one here")
    ] = None,
    idle: Annotated[float, typer.Option(help="Seconds until unused replicas of 0-N end", min=1)] = 600.0,
    inline: Annotated[bool, typer.Option("--inline", help="Sample in this process, without Ray")] = False,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts to the log")] = False,
) -> None:
    """Serve images over HTTP in the form of OpenAI's interface. The same seed gives the same bytes."""
    from orchestrator.serving.config import Batching, Limits, Replicas, ServiceConfig
    from orchestrator.serving.keys import ApiKeys
    from orchestrator.serving.sources import find_sources

    config = ServiceConfig(
        host=host,
        port=port,
        key_file=keys,
        log_prompts=log_prompts,
        limits=Limits(images=max_images, steps=max_steps, queue=queue, deadline_s=deadline),
        batching=Batching(max_images=max_batch, resident=resident, threads=threads),
        address=address,
        replicas=None if inline else Replicas.parse(replicas, idle),
    )
    accepted = ApiKeys() if keys is None else ApiKeys.read(keys)
    sources = find_sources(models, adapter or ())
    with listen(host, port) as listener:
        from orchestrator.serving.server import run_service  # it imports torch: only for what can be served

        run_service(sources, config, accepted, listener, console)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; raise `ConfigError` if the address is not free or not of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(
            f"{host}:{port} cannot be listened on ({error.strerror or error}); choose another --port, or --host"
        ) from error
