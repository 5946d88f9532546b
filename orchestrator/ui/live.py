"""What the scripts of a page fetch: losses, logs, and the stream of changes."""

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from anyio import Event
from fastapi import APIRouter, Query, Request
from fastapi.responses import PlainTextResponse
from sse_starlette import EventSourceResponse

from orchestrator.pipeline.stage import Stage
from orchestrator.reporting.results import current_graph
from orchestrator.reporting.status import ESCAPES, find_log_file
from orchestrator.run.run_folder import RunFolder
from orchestrator.ui.facts.catalog import RunEntry, require_inside
from orchestrator.ui.facts.curves import load_curves
from orchestrator.ui.watcher import PERIOD_S

LOG_BYTES = 2**16
"""Of a log, sent at once."""

router = APIRouter()


def find_run(request: Request, key: str) -> RunEntry:
    """Return the run with a key; raises `RunFolderError`."""
    entry: RunEntry = request.app.state.catalog.find(key)
    return entry


def load_graph(run: RunFolder) -> list[Stage]:
    """Return the run's present stages."""
    return current_graph(run, run.load_config())


@router.get("/run/{key}/curves.json")
def show_curves(request: Request, key: str) -> dict[str, Any]:
    """Return the loss curves of a run."""
    run = find_run(request, key).run
    return load_curves(run, load_graph(run))


@router.get("/run/{key}/events")
async def stream_changes(request: Request, key: str) -> EventSourceResponse:
    """Send what changes in a run, as long as the page is open."""
    run, ended = find_run(request, key).run, Event()

    async def events() -> AsyncIterator[dict[str, str]]:
        async for kind, data in request.app.state.watcher.watch(run, ended):
            yield {"event": kind, "data": json.dumps(data)}

    return EventSourceResponse(events(), ping=15, shutdown_event=ended, shutdown_grace_period=2 * PERIOD_S)


@router.get("/run/{key}/log")
def show_log(
    request: Request,
    key: str,
    stage: str = "",
    attempt: Annotated[int, Query(ge=0)] = 0,
    start: Annotated[int, Query(ge=-1)] = -1,
) -> PlainTextResponse:
    """Return a part of a stage's log, or of the journal; -1 starts near the end.

    The header X-Log-End is where the next part begins.
    """
    run = find_run(request, key).run
    with require_inside(run, find_log_file(run, stage, attempt)).open("rb") as file:
        size = file.seek(0, 2)
        begin = max(0, size - LOG_BYTES) if start < 0 else min(start, size)
        file.seek(begin)
        data = file.read(LOG_BYTES)
    if start < 0 and begin:
        data = data.partition(b"\n")[2]
        begin = size - len(data)
    if (cut := data.rfind(b"\n") + 1) and begin + len(data) < size:
        data = data[:cut]  # the next part begins with a whole line
    text = ESCAPES.sub("\N{REPLACEMENT CHARACTER}", data.decode(errors="replace"))
    return PlainTextResponse(text, headers={"X-Log-End": str(begin + len(data))})
