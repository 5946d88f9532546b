"""`ddm sample` and `ddm evaluate`: sample a finished run as one grid of images, or score one more selection."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble.config import ReflectionConfig, SamplingConfig
from orchestrator.config.compute import ComputeConfig
from orchestrator.config.schema import RunConfig
from orchestrator.config.stage_kinds import COMPRESSION_KINDS
from orchestrator.errors import ConfigError, RunFolderError
from orchestrator.reporting.results import find_pipeline, find_selection, resolve_sampling, verify_pipeline
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.trust import is_trusted
from router.config import SelectionConfig, selection_label

if TYPE_CHECKING:
    from ensemble.pipeline import EnsemblePipeline
    from ensemble.sampling.sample import SampleResult

PICTURE_SUFFIXES = (".png", ".jpg", ".webp")

MIN_FREE_BYTES = 2**20
"""Space for a grid."""

READABLE_WIDTH = 800
"""Grids of small images are enlarged to about this width, in pixels."""


def with_selection(run: RunFolder, selection: str) -> RunConfig:
    """Return a finished run's configuration with one more selection to score.

    Nothing of `compute` is used if another user wrote it. Raises `RunFolderError` if the ensemble is not finished, and
    `ConfigError` for an unknown selection.
    """
    config = usable_compute(run)
    find_pipeline(run, monolith=False)
    selections = tuple(dict.fromkeys((*config.scores.selections, find_selection(selection, config))))
    return replace(config, scores=replace(config.scores, selections=selections))


def without_compressions(config: RunConfig) -> RunConfig:
    """Return the configuration without its compression stages."""
    nothing: dict[str, Any] = dict.fromkeys(COMPRESSION_KINDS)
    return replace(config, **nothing)


def usable_compute(run: RunFolder) -> RunConfig:
    """Return the run's configuration, without its `compute` if another user wrote it."""
    config = run.load_config()
    return replace(config, folder=str(run.root), compute=config.compute if is_trusted(run) else ComputeConfig())


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRequest:
    """A loaded pipeline, and what `ddm sample` samples from it."""

    pipeline: "EnsemblePipeline"
    config: SamplingConfig
    class_id: int = -1
    """-1 samples without a class."""
    prompts: tuple[str, ...] = ("",)
    """Rows of the grid."""
    negative_prompt: str = ""
    size: tuple[int, int] | None = None
    """Height and width; None is that of the training."""

    def sample(self, seeds: Sequence[int]) -> "SampleResult":
        """Sample one image for each prompt and seed."""
        from ensemble.sampling.prompts import Prompts

        captions = [prompt for prompt in self.prompts for _ in seeds]
        prompts, negative = Prompts.of_captions(captions, self.class_id), None
        if self.negative_prompt:
            negative = Prompts.of_captions([self.negative_prompt] * len(captions))
        is_null = self.class_id < 0 and not any(captions) and negative is None
        seeds = [*seeds] * len(self.prompts)
        return self.pipeline(seeds, self.config, None if is_null else prompts, negative=negative, size=self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """The options of `ddm sample`."""

    label: str = ""
    prompts: tuple[str, ...] = ()
    negative_prompt: str = ""
    selection: str = ""
    steps: int | None = None
    guidance_scale: float | None = None
    monolith: bool = False
    ensemble: Path | None = None
    """Folder of an ensemble that `ddm experts` wrote."""
    size: str = ""
    """Width and height, such as 48x32; empty is that of the training."""
    reflect: int | None = None
    """Reflected solver steps; None leaves the run's reflection as it is."""


def prepare_sampling(run: RunFolder, out: Path, options: SamplingOptions) -> SamplingRequest:
    """Check the options of `ddm sample` and load the pipeline; `out` is checked and not written.

    Raises `ConfigError`, `RunFolderError`, or `PromptError` for an unknown label.
    """
    if out.suffix.lower() not in PICTURE_SUFFIXES:
        raise ConfigError(f"--out must end in one of {', '.join(PICTURE_SUFFIXES)}; got {out}")
    _check_writable(out)
    steps, guidance_scale = options.steps, options.guidance_scale
    monolith, ensemble = options.monolith, options.ensemble
    folder = find_pipeline(run, monolith=monolith) if ensemble is None else verify_pipeline(ensemble)
    config = (
        replace(run.load_config().ensemble, selection=SelectionConfig(name="full"), reflection=None)
        if monolith
        else resolve_sampling(run, options.selection)
    )
    config = replace(
        config,
        steps=config.steps if steps is None else steps,
        guidance_scale=config.guidance_scale if guidance_scale is None else guidance_scale,
    )
    from ensemble.pipeline import EnsemblePipeline
    from ensemble.sampling.prompts import find_class
    from ensemble.sampling.sample import guidance_scale_of

    pipeline = EnsemblePipeline.from_pretrained(folder)
    few_step = pipeline.ensemble.few_step
    if few_step is not None and steps is not None:
        raise ConfigError(
            f"--steps applies only to experts that predict at any t; the experts in {folder} have a few-step schedule "
            f"of {len(few_step.times)} steps: leave --steps out"
        )
    if pipeline.ensemble.includes_guidance and guidance_scale is not None:
        raise ConfigError(
            f"--guidance-scale applies only to experts without distilled guidance; the students in {folder} have it: "
            "leave --guidance-scale out"
        )
    if options.reflect is not None:
        config = replace(config, reflection=find_reflection(run, pipeline, options.reflect))
    if options.negative_prompt and guidance_scale_of(pipeline.ensemble, config) == 1:
        raise ConfigError("--negative-prompt is a branch of guidance, which is off here; set --guidance-scale above 1")
    return SamplingRequest(
        pipeline=pipeline,
        config=config,
        class_id=find_class(options.label, pipeline.class_names) if options.label else -1,
        prompts=options.prompts or ("",),
        negative_prompt=options.negative_prompt,
        size=_parse_size(options.size),
    )


def _parse_size(text: str) -> tuple[int, int] | None:
    """Return the height and width of `48x32`, None for an empty text; raise `ConfigError`."""
    width, _, height = text.partition("x")
    if text and not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ConfigError(f"--size must be width x height in pixels, such as 48x32; got {text!r}")
    return (int(height), int(width)) if text else None


def find_reflection(run: RunFolder, pipeline: "EnsemblePipeline", steps: int) -> ReflectionConfig:
    """Return a reflection of so many steps by the run's weak model, the experts' early checkpoints, or the monolith.

    Raises `ConfigError` if there is none, or for experts with a few-step schedule.
    """
    if pipeline.ensemble.few_step is not None:
        raise ConfigError("--reflect works between solver steps, and few-step experts have none: leave it out")
    configured = run.load_config().ensemble.reflection
    if configured is not None and configured.weak != "monolith":
        return replace(configured, steps=steps)
    if configured is None and all(pipeline.has_early(k) for k in pipeline.ensemble.experts):
        return ReflectionConfig(steps=steps)
    try:
        monolith = find_pipeline(run, monolith=True)
    except RunFolderError as error:
        raise ConfigError(
            f"--reflect needs a weak model: {run.root} has no monolith, and its experts kept no earlier checkpoint; "
            "train with expert.training.early_checkpoint=0.5 or monolith=true"
        ) from error
    return ReflectionConfig(weak="folder", path=str(monolith), steps=steps)


def _check_writable(out: Path) -> None:
    """Raise `ConfigError` for a file that this user cannot write, before anything is sampled."""
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK) or (existing.is_dir() if existing == out else not existing.is_dir()):
        raise ConfigError(f"--out {out} cannot be written, because of {existing}; choose another file")
    if (free := shutil.disk_usage(existing).free) < MIN_FREE_BYTES:
        raise ConfigError(
            f"--out {out} needs a disk with 1 MB free, and {existing} has {free / 1e6:.1f}; choose another file"
        )


def describe_samples(
    request: SamplingRequest, samples: "SampleResult", seeds: Sequence[int], out: Path
) -> dict[str, Any]:
    """Return what was sampled, for scripts."""
    return {
        "file": out,
        "images": len(samples.images),
        "seeds": list(seeds),
        "prompts": request.prompts,
        "selection": selection_label(request.config.selection),
        "calls_per_step": samples.calls_per_step,
    }


def save_grid(request: SamplingRequest, samples: "SampleResult", out: Path) -> str:
    """Write the images as one grid and return a summary, with a warning if experts are missing."""
    from PIL.Image import Resampling

    from ensemble.membership import missing_warning
    from ensemble.sampling.images import image_grid

    count = len(samples.images)
    columns = round(count**0.5) if len(request.prompts) == 1 else count // len(request.prompts)
    grid = image_grid(samples.images, columns=max(1, columns))
    enlargement = max(1, READABLE_WIDTH // grid.width)
    enlarged = grid.resize((grid.width * enlargement, grid.height * enlargement), Resampling.NEAREST)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        enlarged.save(out)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror or error}); choose another file") from error
    selection = selection_label(request.config.selection)
    summary = f"{out}: {count} images, {selection}, {samples.calls_per_step:.2f} expert calls per step"
    warning = missing_warning(request.pipeline.ensemble)
    return f"{summary}\nWarning: {warning}" if warning else summary
