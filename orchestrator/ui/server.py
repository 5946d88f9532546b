"""The web application of `ddm ui`, and its server."""

import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from ddm_core.errors import DDMError
from orchestrator.errors import RunFolderError
from orchestrator.ui import live, media, playground, views
from orchestrator.ui.access import Guard
from orchestrator.ui.facts.catalog import RunCatalog
from orchestrator.ui.facts.overview import FOREIGN, OverviewCache, describe_foreign
from orchestrator.ui.facts.pictures import PictureCache
from orchestrator.ui.playground import Service
from orchestrator.ui.templating import create_templates
from orchestrator.ui.watcher import RunWatcher

log = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"

SHUTDOWN_S = 5
"""Open pages keep a connection, which ends by itself after a look; the server waits no longer than this."""

Handler = Callable[[Request, Exception], Awaitable[Response] | Response]


def create_app(
    catalog: RunCatalog, token: str = "", *, watcher: RunWatcher | None = None, service: Service | None = None
) -> FastAPI:
    """Return the application for these runs; with a token, viewers must enter it, with a service they may draw."""
    app = FastAPI(title="ddm ui", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.catalog, app.state.watcher, app.state.templates = catalog, watcher or RunWatcher(), create_templates()
    app.state.pictures, app.state.overviews = PictureCache(), OverviewCache()
    app.state.service = service
    if service is not None:
        app.include_router(playground.router)
        app.state.templates.globals["has_playground"] = True
    app.include_router(views.router)
    app.include_router(live.router)
    app.include_router(media.router)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.add_middleware(Guard, token=token, forms=() if service is None else (playground.PATH,))
    handler: Any = _show_error
    for kind in (DDMError, OSError, HTTPException, *FOREIGN):
        app.add_exception_handler(kind, handler)
    return app


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve the application on a listening socket until Ctrl-C or SIGTERM."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=SHUTDOWN_S
    )
    uvicorn.Server(config).run(sockets=[listener])


def _show_error(request: Request, error: Exception) -> Response:
    """Answer with the message of an error: a run folder may be damaged, foreign, or gone."""
    if isinstance(error, HTTPException):
        status, message = error.status_code, "There is no such page." if error.status_code == 404 else error.detail
    elif isinstance(error, FOREIGN):
        log.warning("%s", request.url.path, exc_info=error)
        status, message = 500, describe_foreign(error)
    else:
        status, message = 404 if isinstance(error, RunFolderError | FileNotFoundError) else 500, str(error)
    if "text/html" not in request.headers.get("accept", ""):
        return PlainTextResponse(message, status)
    page = request.app.state.templates.get_template("error.html").render(message=message)
    return HTMLResponse(page, status)
