"""Pictures of a run, by what they show; nothing is served by a path in an address."""

from fastapi import APIRouter, Request
from fastapi.responses import Response

from orchestrator.errors import RunFolderError
from orchestrator.pipeline.stage import FIRST_SAMPLES, Stage
from orchestrator.run.run_folder import RunFolder
from orchestrator.ui.facts.catalog import require_inside
from orchestrator.ui.facts.samples import open_samples
from orchestrator.ui.live import find_run, load_graph

KEPT = {"Cache-Control": "private, max-age=3600"}
"""A finished artifact does not change; a new configuration may give its address to another after an hour."""

router = APIRouter()


@router.get("/run/{key}/grid/{stage}.png")
def show_grid(request: Request, key: str, stage: str) -> Response:
    """Return the samples of a score as one picture."""
    run = find_run(request, key).run
    path = require_inside(run, run.artifact(find_stage(run, stage)) / "grid.png")
    return Response(path.read_bytes(), media_type="image/png", headers=KEPT)


@router.get("/run/{key}/sample/{stage}/{place}.png")
def show_sample(request: Request, key: str, stage: str, place: int) -> Response:
    """Return one sample of a score."""
    run = find_run(request, key).run
    return Response(open_samples(run, find_stage(run, stage)).png(place), media_type="image/png", headers=KEPT)


@router.get("/run/{key}/first/{stage}.png")
def show_first_samples(request: Request, key: str, stage: str) -> Response:
    """Return the samples that an expert drew at its first checkpoint."""
    run = find_run(request, key).run
    attempts = run.attempts(find_stage(run, stage))
    if not attempts:
        raise RunFolderError(f"{stage} has not started yet")
    return Response(require_inside(run, attempts[-1] / FIRST_SAMPLES).read_bytes(), media_type="image/png")


def find_stage(run: RunFolder, name: str) -> Stage:
    """Return the stage of this name in the run's present graph; raises `RunFolderError` if there is none."""
    stage = next((stage for stage in load_graph(run) if stage.name == name), None)
    if stage is None:
        raise RunFolderError(f"this run has no stage {name!r}")
    return stage
