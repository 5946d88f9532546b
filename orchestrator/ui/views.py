"""The pages: one function for each address that a person opens."""

from typing import Annotated, Any

import yaml
from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse

from ddm_core.artifacts import to_jsonable
from orchestrator.errors import RunFolderError
from orchestrator.ui.facts.comparison import common_seeds, list_differences
from orchestrator.ui.facts.overview import load_overview, load_overviews
from orchestrator.ui.facts.pipeline_graph import BOX_WIDTH, draw_graph
from orchestrator.ui.facts.samples import open_samples
from orchestrator.ui.live import find_run

router = APIRouter()


def render(request: Request, template: str, facts: dict[str, Any]) -> HTMLResponse:
    """Return a filled-in template."""
    return HTMLResponse(request.app.state.templates.get_template(template).render(**facts))


@router.get("/")
def show_runs(request: Request) -> HTMLResponse:
    """List all runs."""
    return render(request, "runs.html", {"runs": load_overviews(request.app.state.catalog.entries())})


@router.get("/compare")
def show_comparison(request: Request, run: Annotated[list[str] | None, Query()] = None) -> HTMLResponse:
    """Show two runs side by side."""
    if run is None or len(run) != 2:
        raise RunFolderError(f"a comparison needs two runs, not {len(run or [])}: tick two in the list of runs")
    pair = [load_overview(find_run(request, key)) for key in run]
    seeds = {}
    if all(overview.gallery for overview in pair):
        files = [open_samples(overview.entry.run, overview.gallery_stage) for overview in pair]
        seeds = common_seeds(*files)
    facts = {
        "runs": pair,
        "seeds": list(seeds),
        "places": list(seeds.values()),
        "differences": list_differences(pair[0].config, pair[1].config),
    }
    return render(request, "compare.html", facts)


@router.get("/run/{key}")
def show_run(request: Request, key: str) -> HTMLResponse:
    """Show the progress of a run."""
    return render(request, "run.html", _run_facts(request, key))


@router.get("/run/{key}/status")
def show_status(request: Request, key: str) -> HTMLResponse:
    """Return the part of a run's page that changes while it runs."""
    return render(request, "run_status.html", _run_facts(request, key))


@router.get("/run/{key}/stage/{name}")
def show_stage(request: Request, key: str, name: str, attempt: Annotated[int, Query(ge=0)] = 0) -> HTMLResponse:
    """Show the log and the settings of a stage."""
    overview = load_overview(find_run(request, key))
    stage = next((stage for stage in overview.graph if stage.name == name), None)
    if stage is None:
        raise RunFolderError(f"this run has no stage {name!r}")
    count = len(overview.entry.run.attempts(stage))
    facts = {
        "overview": overview,
        "view": "run",
        "row": next(row for row in overview.rows if row.name == name),
        "attempts": [a for a in overview.attempts if a.folder.parent.name == stage.folder_name],
        "attempt": attempt if 0 < attempt <= count else count,
        "settings": yaml.safe_dump(to_jsonable(stage.config), sort_keys=False, allow_unicode=True),
    }
    return render(request, "stage.html", facts)


def _run_facts(request: Request, key: str) -> dict[str, Any]:
    overview = load_overview(find_run(request, key))
    drawing = draw_graph(overview.graph, overview.rows)
    return {"overview": overview, "view": "run", "drawing": drawing, "box_width": BOX_WIDTH}
