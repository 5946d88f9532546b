"""Run the service: open its models, listen, and end with everything that was started."""

import contextlib
import socket
from collections.abc import Iterator, Sequence

import torch
import uvicorn
from rich.console import Console

from orchestrator.controller import configure_ray_security
from orchestrator.serving.app import create_app
from orchestrator.serving.backend import LocalBackend, ServingBackend
from orchestrator.serving.config import ServiceConfig
from orchestrator.serving.keys import ApiKeys
from orchestrator.serving.model import read_adapters
from orchestrator.serving.sources import ModelSource

KEEP_ALIVE_S = 30
DRAIN_S = 5
"""How long open requests may take after the service was interrupted."""


def run_service(
    sources: Sequence[ModelSource], config: ServiceConfig, keys: ApiKeys, listener: socket.socket, console: Console
) -> None:
    """Serve models at the address of the listener, until the process is interrupted."""
    for source in sources:
        read_adapters(source)  # a deployment would say less clearly that one does not fit
        if source.sampling.device != "cpu" or source.sampling.compile:
            console.print(
                f"{source.name} is sampled on the CPU, uncompiled: ensemble.device={source.sampling.device} and "
                f"ensemble.compile={source.sampling.compile} of its run have no effect here",
                soft_wrap=True,
            )
    with _open_backend(sources, config) as backend:
        host, port = listener.getsockname()[:2]
        console.print(
            f"{', '.join(backend.facts)}: http://{f'[{host}]' if ':' in host else host}:{port}/v1 (its page: /docs)",
            highlight=False,
            soft_wrap=True,
        )
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(backend, config, keys),
                log_level="warning",
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=DRAIN_S,
            )
        )
        server.run(sockets=[listener])


@contextlib.contextmanager
def _open_backend(sources: Sequence[ModelSource], config: ServiceConfig) -> Iterator[ServingBackend]:
    """Open what samples, in this process or on Ray, and end it."""
    if config.replicas is None:
        torch.set_num_threads(config.batching.threads)
        yield LocalBackend(sources, config.batching)
        return
    configure_ray_security(config.address)
    from orchestrator.serving.deployments import RayServeBackend

    with contextlib.closing(
        RayServeBackend.start(sources, config.batching, config.replicas, config.limits.queue, config.address)
    ) as backend:
        yield backend
