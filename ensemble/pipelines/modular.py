"""The folder of an ensemble as a `ModularPipeline` of diffusers: its `load_components` loads experts one by one.

A call loads the experts that it needs; where the budget is full, those that were not called for longest are unloaded.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel, FlowMatchEulerDiscreteScheduler, ModularPipeline
from diffusers.modular_pipelines import ComponentSpec, InputParam, ModularPipelineBlocks, OutputParam
from torch import nn

from ensemble.pipeline import EnsemblePipeline
from ensemble.pipeline_folder import INDEX, PipelineError
from ensemble.pipelines.components import expert_name, to_component
from ensemble.pipelines.diffusion_pipeline import EnsembleDiffusionPipeline
from ensemble.pipelines.hub import local_folder
from ensemble.pipelines.paging import ExpertPager, PagedExpert, choose_residency, read_bytes, weight_bytes
from ensemble.pipelines.schedulers import load_scheduler
from ensemble.pipelines.trusted_files import check_files
from experts.compressed.quantization.shared_weight_io import SHARED
from experts.conditions.unmasked_text_encoder import UnmaskedTextEncoder
from experts.expert import Expert

INPUTS = {
    "prompt": "prompts, for pipelines with a text encoder",
    "negative_prompt": "what guidance leads away from",
    "class_labels": "classes, as names or numbers",
    "seeds": "the seed of every image",
    "num_inference_steps": "steps of the scheduler",
    "guidance_scale": "1 is none",
    "selection": "the rule that draws or mixes experts",
    "prompt_embeds": "texts, in place of prompts",
    "prompt_attention_mask": "tokens of the texts that are none of the padding",
    "pooled_prompt_embeds": "pooled vectors of the texts",
    "output_type": "pil, np, pt or latent",
}
"""Inputs of a call, of those of `DDMPipeline`."""


class EnsembleBlock(ModularPipelineBlocks):  # type: ignore[misc, unused-ignore]
    """The block that samples an ensemble; its components are the experts and all other parts of a folder."""

    model_name = "ddm"

    def __init__(self, folder: Path, networks: list[str], parts: list[str]) -> None:
        """Name the components of a folder: networks that are loaded by need, and parts that are there."""
        self.folder, self.networks, self.parts = folder, networks, parts
        super().__init__()

    @property
    def description(self) -> str:
        """Return what the block does."""
        return f"Samples an ensemble of {len(self.networks)} experts."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """Return the experts and the other parts; the folder has all of them."""
        types = {"scheduler": FlowMatchEulerDiscreteScheduler}
        source = {"pretrained_model_name_or_path": str(self.folder)}
        return [
            ComponentSpec(name=name, type_hint=types.get(name, AutoModel), subfolder=name, **source)
            for name in (*self.parts, *self.networks)
        ]

    @property
    def inputs(self) -> list[InputParam]:
        """Return the inputs of a call, all optional."""
        return [InputParam(name, description=text) for name, text in INPUTS.items()]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """Return images and clean latents."""
        return [OutputParam("images"), OutputParam("latents", type_hint=torch.Tensor)]

    def __call__(self, components: Any, state: Any) -> Any:
        """Sample, and put images and latents into the state."""
        block = self.get_block_state(state)
        given = {name: getattr(block, name) for name in INPUTS}
        output = components.ensemble_pipeline(**{name: value for name, value in given.items() if value is not None})
        block.images, block.latents = output.images, output.latents
        self.set_block_state(state, block)
        return components, state


class EnsembleModularPipeline(ModularPipeline):  # type: ignore[misc, unused-ignore]
    """An ensemble whose experts are loaded and unloaded by name; a call loads those that it needs."""

    def __init__(
        self,
        name: str | os.PathLike[str],
        *,
        max_memory: int | str | None = None,
        dtype: torch.dtype | None = None,
        scheduler: Any = None,
        text_encoder: Any = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> None:
        """Open a pipeline folder or a repository of the Hub without its experts' weights; nothing in it is executed.

        `max_memory` is the most memory of experts at a time, in bytes or as in `"4GB"` (default: all fit). Raises
        `PipelineError` or an `ArtifactError` for a folder that cannot be loaded.
        """
        folder = local_folder(str(name), revision, token)
        if not (folder / INDEX).is_file():
            raise PipelineError(f"{folder} is no ensemble's folder: no {INDEX}; a run has one in artifacts/ensemble-…")
        check_files(folder)
        if (folder / SHARED).is_dir():
            raise PipelineError(f"the experts of {folder} share weights, and are loaded together: use DDMPipeline")
        experts = {int(path.name.removeprefix("expert_")): path for path in sorted(folder.glob("expert_*"))}
        total = sum(map(weight_bytes, experts.values()))
        self.pager = ExpertPager(max_bytes=total if max_memory is None else read_bytes(max_memory), dtype=dtype)
        if experts:
            choose_residency(experts, self.pager.max_bytes, keeps_expert=True)
        loaded = EnsemblePipeline.from_pretrained(folder, partial(PagedExpert.open, pager=self.pager))
        self.ensemble_pipeline: Any = EnsembleDiffusionPipeline.from_ensemble(
            loaded, scheduler or load_scheduler(folder / "scheduler"), text_encoder or UnmaskedTextEncoder.find(folder)
        )
        parts = {
            part: getattr(self.ensemble_pipeline, part) for part in ("scheduler", "codec", "router", "text_encoder")
        }
        parts = {part: component for part, component in parts.items() if component is not None}
        self._paged: dict[str, PagedExpert] = {expert_name(k): e for k, e in loaded.ensemble.experts.items()}
        super().__init__(
            blocks=EnsembleBlock(folder, list(self._paged), list(parts)), pretrained_model_name_or_path=str(folder)
        )
        self.register_components(**parts)
        self.pager.on_change = self._show

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **settings: Any) -> "EnsembleModularPipeline":
        """Open a folder; the arguments are those of the constructor."""
        return cls(name, **settings)

    def load_components(self, names: list[str] | str | None = None) -> None:
        """Load these experts (default: all); others are unloaded if the budget is full.

        Raises `PipelineError` for an unknown name, and an `ArtifactError` for an expert that cannot be loaded.
        """
        chosen = list(self._paged) if names is None else [names] if isinstance(names, str) else names
        if unknown := sorted(set(chosen) - set(self.component_names)):
            raise PipelineError(f"there is no component {unknown[0]!r}; there are {', '.join(self.component_names)}")
        for name in chosen:
            if name in self._paged:
                self.pager.get(self._paged[name])

    def unload_components(self, names: list[str] | str) -> None:
        """Free the memory of these experts; raises `PipelineError` for any other component."""
        chosen = [names] if isinstance(names, str) else names
        if others := sorted(set(chosen) - set(self._paged)):
            raise PipelineError(f"{others[0]!r} is no expert; those that unload are {', '.join(self._paged)}")
        for name in chosen:
            self.pager.drop(self._paged[name].folder)

    def to(self, *args: Any, **kwargs: Any) -> "EnsembleModularPipeline":
        """Move or convert the parts, as `DDMPipeline.to` does; experts are loaded to there from now on."""
        self.ensemble_pipeline.to(*args, **kwargs)
        return self

    def _show(self, folder: Path, expert: Expert | None) -> None:
        component: nn.Module | None = None if expert is None else to_component(expert)
        self.register_components(**{folder.name: component})
