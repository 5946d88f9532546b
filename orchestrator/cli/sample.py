"""`ddm sample`: from a finished run to one picture."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from ddm_core.artifacts import verify
from orchestrator.config.schema import RunConfig
from orchestrator.errors import ConfigError, RunFolderError
from orchestrator.reporting.results import current_graph, selection_choice
from orchestrator.run.run_folder import RunFolder
from router.config import AUTO, SelectionConfig, SelectionName, selection_label

PICTURE_SUFFIXES = (".png", ".jpg", ".webp")

READABLE_WIDTH = 800
"""Pictures of small images are enlarged to about so many pixels."""


def selection_named(name: str, config: RunConfig) -> SelectionConfig:
    """The run's own settings of a selection, or that selection with its defaults; empty is the run's default."""
    if not name:
        return config.ensemble.selection
    names = (*get_args(SelectionName), AUTO)
    defaults = [SelectionConfig(name=known) for known in names]
    for selection in (
        config.ensemble.selection,
        *config.scores.selections,
        *config.selection_search.candidates,
        *defaults,
    ):
        if name in (selection.name, selection_label(selection)):
            return selection
    raise ConfigError(f"{name!r} is not a selection; known: {', '.join(names)}")


def resolved(run: RunFolder, selection: SelectionConfig) -> SelectionConfig:
    """The selection itself, or the one that the run has chosen for `auto`."""
    if selection.name != AUTO:
        return selection
    choice = selection_choice(run, current_graph(run, run.load_config()))
    if choice is None:
        raise RunFolderError(
            f"{run.root} has not chosen a selection; let it choose with `ddm evaluate {run.root} --select auto`, "
            "or name one, such as --select sticky"
        )
    return SelectionConfig(**choice["selection"])


def pipeline_folder(run: RunFolder, *, monolith: bool) -> Path:
    """The finished pipeline folder of the ensemble or of the monolith, compared with its checksums."""
    name = "monolith_ensemble" if monolith else "ensemble"
    graph = current_graph(run, run.load_config())
    stage = next((stage for stage in graph if stage.name == name), None)
    if stage is None or not run.finished(stage):
        raise RunFolderError(f"{run.root} has no finished {name}; finish the run with `ddm resume {run.root}`")
    verify(run.artifact(stage))
    return run.artifact(stage)


def sample_run(
    run: RunFolder,
    seeds: Sequence[int],
    label: str,
    select: str,
    out: Path,
    steps: int | None,
    guidance_scale: float | None,
    *,
    monolith: bool,
    ensemble: Path | None = None,
) -> str:
    """Sample, write the picture, and say what was drawn; `ensemble` is the folder of one that `ddm experts` made."""
    if out.suffix.lower() not in PICTURE_SUFFIXES:
        raise ConfigError(f"--out {out} must end in one of {', '.join(PICTURE_SUFFIXES)}")
    config = run.load_config()
    folder = ensemble or pipeline_folder(run, monolith=monolith)
    selection = SelectionConfig(name="full") if monolith else resolved(run, selection_named(select, config))
    own = config.ensemble
    sampling = replace(
        own,
        selection=selection,
        steps=own.steps if steps is None else steps,
        guidance_scale=own.guidance_scale if guidance_scale is None else guidance_scale,
    )
    from PIL.Image import Resampling

    from ensemble.membership import missing_warning
    from ensemble.pipeline import DDMPipeline
    from ensemble.sampling.images import grid

    pipeline = DDMPipeline.from_pretrained(folder)
    course = pipeline.ensemble.few_step
    if course is not None and steps is not None:
        raise ConfigError(
            f"--steps is for experts that can be asked at any t; those in {folder} have their own {len(course.times)}: "
            "leave it out"
        )
    if course is not None and course.is_distilled and guidance_scale is not None:
        raise ConfigError(f"the students in {folder} have their guidance within them: leave --guidance-scale out")
    class_id = _class_id(label, pipeline.class_names)
    samples = pipeline(seeds, sampling, None if class_id is None else [class_id] * len(seeds))
    out.parent.mkdir(parents=True, exist_ok=True)
    picture = grid(samples.images, columns=max(1, round(len(seeds) ** 0.5)))
    enlargement = max(1, READABLE_WIDTH // picture.width)
    picture.resize((picture.width * enlargement, picture.height * enlargement), Resampling.NEAREST).save(out)
    said = f"{out}: {len(seeds)} images, {selection_label(selection)}, {samples.calls_per_step:.2f} expert calls a step"
    warning = missing_warning(pipeline.ensemble)
    return f"{said}\n[yellow]Warning:[/] {warning}" if warning else said


def _class_id(label: str, class_names: Sequence[str]) -> int | None:
    if not label:
        return None
    if label in class_names:
        return list(class_names).index(label)
    if label.isdigit() and int(label) < len(class_names):
        return int(label)
    known = ", ".join(f"{number} {name}" for number, name in enumerate(class_names)) or "none: the run has no labels"
    raise ConfigError(f"--label {label!r} is not a class of this run; known: {known}")
