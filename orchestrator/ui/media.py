"""Pictures of a run, by what they show; nothing is served by a path in an address."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ddm_core.artifacts import read_small_file
from orchestrator.errors import RunFolderError
from orchestrator.pipeline.stage import Stage
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.step_samples import find_step_samples
from orchestrator.run.trust import may_read_images
from orchestrator.ui.facts import overview
from orchestrator.ui.facts.catalog import require_inside
from orchestrator.ui.facts.feature_map import load_map
from orchestrator.ui.facts.samples import open_samples
from orchestrator.ui.facts.trajectories import load_trajectories
from orchestrator.ui.live import find_run, load_graph

KEPT = {"Cache-Control": "private, max-age=3600"}
"""A finished artifact does not change; a new configuration may give its address to another after an hour."""

router = APIRouter()


@router.get("/run/{key}/grid/{stage}.png")
def show_grid(request: Request, key: str, stage: str) -> Response:
    """Return the samples of a score as one picture."""
    run = find_run(request, key).run
    path = require_inside(run, run.artifact(find_stage(run, stage)) / "grid.png")
    return Response(read_small_file(path), media_type="image/png", headers=KEPT)


@router.get("/run/{key}/sample/{stage}/{place}.png")
def show_sample(request: Request, key: str, stage: str, place: int) -> Response:
    """Return one sample of a score."""
    run = find_run(request, key).run
    return Response(open_samples(run, find_stage(run, stage)).png(place), media_type="image/png", headers=KEPT)


@router.get("/run/{key}/film/{stage}/{seed}/{frame}.png")
def show_frame(request: Request, key: str, stage: str, seed: int, frame: int) -> Response:
    """Return one picture of a trajectory; -1 is the image."""
    run = find_run(request, key).run
    kept = load_trajectories(run, find_stage(run, stage))
    if kept is None:
        raise RunFolderError(f"{stage} keeps no trajectories")
    return Response(kept.png(seed, frame), media_type="image/png", headers=KEPT)


@router.get("/run/{key}/steps/{stage}/{step}.png")
def show_step_samples(request: Request, key: str, stage: str, step: int) -> Response:
    """Return the samples that an expert drew at a step of its training."""
    run = find_run(request, key).run
    pictures = find_step_samples(run, find_stage(run, stage))
    if step not in pictures:
        raise RunFolderError(f"{stage} has drawn no samples at step {step}")
    return Response(read_small_file(require_inside(run, pictures[step].picture)), media_type="image/png")


@router.get("/run/{key}/cluster/{cluster}/{number}.png")
def show_cluster_picture(request: Request, key: str, cluster: int, number: int) -> Response:
    """Return one of the pictures of a cluster's wall."""
    run = find_run(request, key).run
    folder = run.artifact(find_stage(run, "partition")) / "clusters" / str(cluster)
    require_shards(run, folder)
    return Response(request.app.state.pictures.wall(folder, number), media_type="image/png", headers=KEPT)


@router.get("/run/{key}/train/{row}.png")
def show_training_picture(request: Request, key: str, row: int) -> Response:
    """Return one picture of the training set."""
    run = find_run(request, key).run
    folder = run.artifact(find_stage(run, "dataset")) / "train"
    require_shards(run, folder)
    return Response(request.app.state.pictures.sample(folder, row), media_type="image/png", headers=KEPT)


@router.get("/run/{key}/map.json")
def show_map(request: Request, key: str) -> dict[str, Any]:
    """Return the features of the data set in two dimensions."""
    run = find_run(request, key).run
    return load_map(run, load_graph(run))


def require_shards(run: RunFolder, folder: Path) -> None:
    """Raise `RunFolderError` unless every file of a folder of shards lies in the run folder, and images may be read."""
    require_inside(run, folder / "index.json")
    for path in folder.iterdir():
        require_inside(run, path)
    if not may_read_images(run, folder):
        raise RunFolderError(
            f"the images of {folder} are at addresses that you did not choose, so they are not read; `ddm plan RUN "
            "--trust` shows them"
        )


def find_stage(run: RunFolder, name: str) -> Stage:
    """Return the stage of this name in the run's present graph; raises `RunFolderError` if there is none."""
    return overview.find_stage(load_graph(run), name)
