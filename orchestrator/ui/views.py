"""The pages: one function for each address that a person opens."""

from collections import Counter
from typing import Annotated, Any

import yaml
from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse

from ddm_core.artifacts import to_jsonable
from orchestrator.errors import RunFolderError
from orchestrator.ui.facts.comparison import common_seeds, list_differences
from orchestrator.ui.facts.overview import Overview, load_overview
from orchestrator.ui.facts.pipeline_graph import BOX_WIDTH, draw_graph
from orchestrator.ui.facts.samples import load_conditions, open_samples
from orchestrator.ui.facts.sections import (
    compression_facts,
    partition_facts,
    reliability_facts,
    router_facts,
    score_facts,
    training_facts,
)
from orchestrator.ui.facts.trajectories import Film, explain_absence, load_trajectories
from orchestrator.ui.live import find_run

PAGE = 96
"""Samples on one page of the gallery."""

router = APIRouter()


def render(request: Request, template: str, facts: dict[str, Any]) -> HTMLResponse:
    """Return a filled-in template."""
    return HTMLResponse(request.app.state.templates.get_template(template).render(**facts))


@router.get("/")
def show_runs(request: Request) -> HTMLResponse:
    """List all runs."""
    return render(request, "runs.html", {"runs": request.app.state.overviews.load(request.app.state.catalog.entries())})


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
    return render(request, "sections/run_status.html", _run_facts(request, key))


@router.get("/run/{key}/stage/{name}")
def show_stage(request: Request, key: str, name: str, attempt: Annotated[int, Query(ge=0)] = 0) -> HTMLResponse:
    """Show the log and the settings of a stage."""
    overview = load_overview(find_run(request, key))
    stage = overview.stage(name)
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


@router.get("/run/{key}/partition")
def show_partition(request: Request, key: str) -> HTMLResponse:
    """Show the clusters as walls of pictures, and a map of the features."""
    overview = load_overview(find_run(request, key))
    facts = {
        "overview": overview,
        "view": "partition",
        "has_map": overview.has_finished("partition") and overview.has_finished("features"),
        "side": overview.config.data.image_size,
        **partition_facts(overview, with_pictures=False),
    }
    return render(request, "partition.html", facts)


@router.get("/run/{key}/samples")
def show_samples(
    request: Request, key: str, score: str = "", q: str = "", page: Annotated[int, Query(ge=1)] = 1
) -> HTMLResponse:
    """Show the samples of one score, by seed, with their conditions."""
    overview = load_overview(find_run(request, key))
    run = overview.entry.run
    names = [f"score_{row.name}" for row in overview.scores]
    chosen = score if score in names else overview.gallery
    conditions = load_conditions(run, overview.graph, overview.stage(chosen)) if chosen else {}
    samples = [
        (place, seed, condition)
        for place, (seed, condition) in enumerate(conditions.items())
        if q.lower() in f"{seed} {condition}".lower()
    ]
    facts = {
        "overview": overview,
        "view": "samples",
        "names": names,
        "chosen": chosen,
        "q": q,
        "page": page,
        "pages": max(1, -(-len(samples) // PAGE)),
        "count": len(samples),
        "conditions": conditions,
        "samples": samples[(page - 1) * PAGE : page * PAGE],
        "films": load_films(overview, chosen) if chosen else [],
        "no_film": explain_absence(run, overview.stage(chosen), None) if chosen else "",
        **score_facts(overview),
    }
    return render(request, "samples.html", facts)


@router.get("/run/{key}/samples/{seed}")
def show_seed(request: Request, key: str, seed: int) -> HTMLResponse:
    """Show what every scored model draws from one seed."""
    overview = load_overview(find_run(request, key))
    run = overview.entry.run
    drawn, condition, films = [], "", []
    for row in overview.scores:
        stage = overview.stage(f"score_{row.name}")
        conditions = load_conditions(run, overview.graph, stage)
        if seed in conditions:
            drawn.append((row, stage.name, list(conditions).index(seed)))
            condition = condition or conditions[seed]
            films += [(row, *film) for kept_seed, *film in load_films(overview, stage.name) if kept_seed == seed]
    if not drawn:
        raise RunFolderError(f"no score of this run has drawn seed {seed}")
    first = overview.gallery_stage
    facts = {
        "overview": overview,
        "view": "samples",
        "seed": seed,
        "drawn": drawn,
        "condition": condition,
        "films": films,
        "no_film": explain_absence(run, first, load_trajectories(run, first)),
    }
    return render(request, "seed.html", facts)


@router.get("/run/{key}/router")
def show_router(request: Request, key: str, score: str = "", seed: int = -1) -> HTMLResponse:
    """Show the gates of one sample, and the router's quality and calibration, over t."""
    overview = load_overview(find_run(request, key))
    run, names = overview.entry.run, [f"score_{row.name}" for row in overview.scores]
    chosen = score if score in names else overview.gallery
    films = {film[0]: film for film in load_films(overview, chosen)} if chosen else {}
    seed, frames, chart = films.get(seed) or next(iter(films.values()), (seed, [], None))
    facts = {
        "overview": overview,
        "view": "router",
        **router_facts(overview),
        "names": names,
        "chosen": chosen,
        "seeds": list(films),
        "seed": seed,
        "frames": frames,
        "chart": chart,
        "condition": load_conditions(run, overview.graph, overview.stage(chosen)).get(seed, "") if films else "",
        "no_film": explain_absence(run, overview.stage(chosen), None) if chosen else "",
    }
    return render(request, "router.html", facts)


@router.get("/run/{key}/compression")
def show_compression(request: Request, key: str) -> HTMLResponse:
    """Show size and quality of every compressed ensemble."""
    overview = load_overview(find_run(request, key))
    facts = {"overview": overview, "view": "compression", **compression_facts(overview)}
    return render(request, "compression.html", facts)


@router.get("/run/{key}/reliability")
def show_reliability(request: Request, key: str) -> HTMLResponse:
    """Show attempts, lost work and goodput."""
    overview = load_overview(find_run(request, key))
    states = Counter(attempt.state for attempt in overview.current_attempts)
    facts = {"overview": overview, "view": "reliability", "states": states, **reliability_facts(overview)}
    return render(request, "reliability.html", facts)


def load_films(overview: Overview, score: str) -> list[Film]:
    """Return the trajectories that a score keeps."""
    kept, address = (
        load_trajectories(overview.entry.run, overview.stage(score)),
        f"/run/{overview.entry.key}/film/{score}",
    )
    return kept.films(lambda seed, frame: f"{address}/{seed}/{frame}.png") if kept else []


def _run_facts(request: Request, key: str) -> dict[str, Any]:
    overview = load_overview(find_run(request, key))
    drawing = draw_graph(overview.graph, overview.rows)
    return {"overview": overview, "view": "run", "drawing": drawing, "box_width": BOX_WIDTH, **training_facts(overview)}
