"""An ensemble as one model: names and seeds in, PIL images out."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.pipeline import INDEX, EnsemblePipeline, PipelineError
from ensemble.routing import CallCounts
from ensemble.sampling.images import to_bytes
from ensemble.sampling.prompts import Prompts, find_class
from orchestrator.cli.sample import find_pipeline, resolve_selection
from orchestrator.config.schema import RunConfig
from orchestrator.run.run_folder import RunFolder
from router.config import SelectionConfig, SelectionName

Images = Float[Tensor, "image height width channel"]
Latents = Float[Tensor, "image *latent"]
ClassLabel = str | int | None
OutputType = Literal["pil", "pt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineOutput:
    """What one call of a pipeline returns."""

    images: list[Image.Image] | Images
    """PIL images, or with `output_type="pt"` a tensor with values from 0 to 1."""
    latents: Latents
    """The clean latents, before decoding."""
    call_counts: CallCounts
    """Network evaluations per expert, of the router, and velocity evaluations."""


class DDMPipeline:
    """An ensemble of experts that samples like one model.

    Image i depends on seed i alone, whatever the batch.
    """

    def __init__(self, pipeline: EnsemblePipeline, sampling: SamplingConfig | None = None) -> None:
        self._pipeline = pipeline
        self.sampling = sampling or SamplingConfig()
        """The settings of a call that gives none of its own."""

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Self:
        """Load a pipeline folder, or the ensemble of a finished run folder with the run's sampling settings.

        Files of a run are compared with their checksums first. Raises `PipelineError`, `ArtifactError` or
        `RunFolderError` for a folder that cannot be loaded; nothing in the folder is executed.
        """
        folder = Path(path).expanduser()
        if (folder / INDEX).is_file():
            return cls(EnsemblePipeline.from_pretrained(folder))
        if not (folder / "config.yaml").is_file():
            raise PipelineError(f"{folder} is neither a pipeline folder (no {INDEX}) nor a run folder (no config.yaml)")
        run = RunFolder(folder)
        sampling = sampling_of_run(run, run.load_config())
        return cls(EnsemblePipeline.from_pretrained(find_pipeline(run, monolith=False)), sampling)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write the pipeline folder; it appears complete or not at all, and replaces one that exists."""
        self._pipeline.save_pretrained(Path(path).expanduser())

    @property
    def ensemble(self) -> Ensemble:
        """The experts, the router and their velocity field."""
        return self._pipeline.ensemble

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; empty for an unconditional model."""
        return self._pipeline.class_names

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent, without the batch."""
        return self._pipeline.codec.latent_shape

    def __call__(
        self,
        *,
        seeds: Sequence[int] = (0,),
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        class_labels: ClassLabel | Sequence[ClassLabel] = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        selection: SelectionName | SelectionConfig | None = None,
        output_type: OutputType = "pil",
    ) -> PipelineOutput:
        """Sample one image per seed.

        `prompt`, `negative_prompt` (which guidance leads away from) and `class_labels` (names or ids) are one for all
        images, or one per seed; None is none. `guidance_scale` 1 means no guidance. Settings that are not given are
        those of the run, or `SamplingConfig`'s defaults. Raises `PromptError` for an unknown class, or a prompt for
        experts without text, `PipelineError` for settings that the experts do not support, and `ValueError` if seeds,
        prompts and labels do not pair, or for a negative prompt without guidance.
        """
        seeds = list(seeds)
        class_ids, captions = self._class_ids(class_labels, len(seeds)), _captions(prompt, len(seeds))
        negative = None if negative_prompt is None else Prompts.of_captions(_captions(negative_prompt, len(seeds)))
        is_null = prompt is None and negative_prompt is None and class_labels is None
        sample = self._pipeline(
            seeds,
            self._settings(num_steps, guidance_scale, selection),
            None if is_null else Prompts(tuple(class_ids), tuple(captions)),
            negative=negative,
        )
        images = [Image.fromarray(pixels.squeeze()) for pixels in to_bytes(sample.images)]
        return PipelineOutput(
            images=images if output_type == "pil" else sample.images, latents=sample.latents, call_counts=sample.calls
        )

    def to(self, device: torch.device | str) -> Self:
        """Return the same pipeline with its networks on another device."""
        ensemble = self.ensemble.to(device)
        sampling = replace(self.sampling, device=str(device))
        return type(self)(replace(self._pipeline, ensemble=ensemble), sampling)

    def _settings(
        self, num_steps: int | None, guidance_scale: float | None, selection: SelectionName | SelectionConfig | None
    ) -> SamplingConfig:
        few_step = self.ensemble.few_step
        if few_step is not None and num_steps is not None:
            raise PipelineError(
                f"num_steps is for experts that accept any t; these have {len(few_step.times)} steps: leave it out"
            )
        if few_step is not None and few_step.is_distilled and guidance_scale is not None:
            raise PipelineError("guidance is part of these distilled students: leave guidance_scale out")
        rule = SelectionConfig(name=selection) if isinstance(selection, str) else selection
        return replace(
            self.sampling,
            steps=self.sampling.steps if num_steps is None else num_steps,
            guidance_scale=self.sampling.guidance_scale if guidance_scale is None else guidance_scale,
            selection=rule or (self.sampling.selection if self.ensemble.router else SelectionConfig(name="full")),
        )

    def _class_ids(self, labels: ClassLabel | Sequence[ClassLabel], count: int) -> list[int]:
        each = [labels] * count if labels is None or isinstance(labels, str | int) else list(labels)
        return [self._class_id(label) for label in each]

    def _class_id(self, label: ClassLabel) -> int:
        if label is None:
            return -1
        return find_class(label, self.class_names) if isinstance(label, str) else int(label)


def _captions(prompt: str | Sequence[str] | None, count: int) -> list[str]:
    return [prompt or ""] * count if prompt is None or isinstance(prompt, str) else list(prompt)


def sampling_of_run(run: RunFolder, config: RunConfig) -> SamplingConfig:
    """Return a run's sampling settings; `auto` is replaced by the selection that the run found."""
    return replace(config.ensemble, selection=resolve_selection(run, config.ensemble.selection))
