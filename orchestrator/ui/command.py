"""`ddm ui`: serve the page of some run folders until Ctrl-C."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.errors import ConfigError
from orchestrator.reporting.terminal import open_console
from orchestrator.serving.command import listen

LIBRARIES = ("fastapi", "httpx", "uvicorn", "sse_starlette")
"""What the extra `ui` installs."""

PORT = 8421


def ui(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="Run folders, or folders of run folders; default: runs", metavar="[RUN]…"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; any but loopback needs --token-file")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one", min=0, max=65535)] = PORT,
    token_file: Annotated[
        Path | None, typer.Option(help="File of mode 600 with the token that every viewer must enter")
    ] = None,
    service: Annotated[
        str, typer.Option(help="Address of `ddm serve`, such as http://127.0.0.1:8000, for the tab Playground")
    ] = "",
    service_key_file: Annotated[
        Path | None, typer.Option(help="File of mode 600 with an API key of that service")
    ] = None,
) -> None:
    """Serve a live web page of runs: progress, losses, clusters, samples, costs. It only reads the run folders."""
    if missing := [name for name in LIBRARIES if importlib.util.find_spec(name) is None]:
        raise ConfigError(
            f"ddm ui needs {', '.join(missing)}; install with `pip install 'decentralized-diffusion[ui]'`"
        )
    from orchestrator.islands.token import is_loopback, read_token_file
    from orchestrator.ui.facts.catalog import RunCatalog

    if service_key_file is not None and not service:
        raise ConfigError("--service-key-file is the key of a service; name the service with --service")
    if token_file is None and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached by other machines: add --token-file with a file of mode 600, "
            "or leave it at 127.0.0.1 and use an SSH tunnel"
        )
    token = "" if token_file is None else read_token_file(token_file.expanduser(), "the token of the page")
    catalog = RunCatalog([path.expanduser() for path in runs or [Path("runs")]])
    with listen(host, port) as listener:
        from orchestrator.ui.playground import Service
        from orchestrator.ui.server import create_app, serve  # a second of imports: only for what can be served

        drawn_by = Service.open(service, service_key_file) if service else None
        shown = f"[{host}]" if ":" in host else host
        note = "; nothing encrypts it: put TLS or a tunnel in front" if token and not is_loopback(host) else ""
        open_console().print(
            f"http://{shown}:{listener.getsockname()[1]} shows {len(catalog.entries())} run(s){note}. Ctrl-C ends it.",
            soft_wrap=True,
            highlight=False,
        )
        serve(create_app(catalog, token, service=drawn_by), listener)
