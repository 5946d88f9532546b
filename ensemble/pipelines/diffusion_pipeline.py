"""An ensemble as a `diffusers.DiffusionPipeline`: experts, router, codec and text encoder are its components."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.pipeline import size_codec
from ensemble.pipeline_folder import PipelineError
from ensemble.pipelines.adapter_methods import AdapterMethods
from ensemble.pipelines.call import (
    ClassLabel,
    Noise,
    OutputType,
    PipelineOutput,
    StepCallback,
    check_output_type,
    check_selection,
    class_ids,
    count_images,
    embed_prompts,
    make_condition,
    repeat_text,
    to_output,
)
from ensemble.pipelines.components import as_expert, expert_ids, expert_name, owner_of, to_component, with_experts
from ensemble.pipelines.denoising_loop import Request, sample_latents
from ensemble.pipelines.folder_methods import FolderMethods
from ensemble.pipelines.guided_field import Guidance
from ensemble.pipelines.optimizations import OptimizationMethods
from ensemble.pipelines.paging import ExpertPager, PagedExpert, Residency, choose_residency
from experts.compressed.caching.diffusers_hooks import CacheHook
from experts.conditions.condition import Condition
from experts.conditions.text_embedding import TextEmbedding
from experts.config import NoiseScheduleName
from experts.diffusion.noise_schedule import NOISE_SCHEDULES
from experts.expert_model import ExpertModel
from experts.networks.adapters.registry import ADAPTERS
from experts.networks.registry import PACKED_SIDE
from experts.types import Latents
from router.config import SelectionConfig, SelectionName

EXPERT_TYPES = (ExpertModel, nn.Module)


class EnsembleDiffusionPipeline(FolderMethods, AdapterMethods, OptimizationMethods, DiffusionPipeline):  # type: ignore[misc, unused-ignore]
    """An ensemble of experts that samples like one model, with the methods of diffusers' pipelines.

    Image i depends on its seed or generator alone, whatever the batch.
    """

    model_cpu_offload_seq = "text_encoder"
    _optional_components = ("router", "text_encoder")
    _callback_tensor_inputs = ("latents", "prompt_embeds", "gates")

    def __new__(cls, *_args: Any, **components: Any) -> "EnsembleDiffusionPipeline":
        """Create an object of the class for these experts."""
        names = tuple(expert_name(k) for k in expert_ids(components))
        base: Any = cls
        made = base if set(names) <= set(cls._optional_components) else with_experts(base, names)
        pipeline: EnsembleDiffusionPipeline = object.__new__(made)
        return pipeline

    def __init__(
        self,
        scheduler: Any,
        codec: Any,
        router: Any = None,
        text_encoder: Any = None,
        class_names: Sequence[str] = (),
        noise_schedule: NoiseScheduleName = "rectified_flow",
        null_text: TextEmbedding | None = None,
        **experts: Any,
    ) -> None:
        """Register the components; `expert_0` ... are experts, or plain networks that predict a velocity.

        `codec` decodes latents; `text_encoder` has `encode(captions)`. `null_text` is the encoded "" for networks
        without one; the default is that of the text encoder. Raises `EnsembleError` or `PipelineError` for
        components that do not fit together.
        """
        super().__init__()
        self._paged: dict[int, PagedExpert] = {}
        self.cache_hooks: dict[int, CacheHook] = {}
        """The caches of experts by their ids, which `enable_cache` sets."""
        for name, expert in experts.items():
            if not expert_ids([name]) or not isinstance(expert, EXPERT_TYPES):
                raise PipelineError(
                    f"{name} must be an expert or a network, named expert_0, expert_1 ...; got {expert!r}"
                )
        codec, text_encoder = owner_of(codec), owner_of(text_encoder)
        null_text = null_text or getattr(text_encoder, "null_text", None)
        for k in expert_ids(experts):
            expert = owner_of(experts[expert_name(k)])
            if not isinstance(expert, ExpertModel):
                expert = as_expert(expert, k, codec.latent_shape, null_text)
            if isinstance(expert, PagedExpert):
                self._paged[k] = expert
            experts[expert_name(k)] = None if k in self._paged else to_component(expert)
        parts = {"codec": codec, "router": owner_of(router), "text_encoder": text_encoder}
        self.register_modules(
            scheduler=scheduler, **{name: to_component(part) for name, part in parts.items()}, **experts
        )
        self.register_to_config(class_names=tuple(class_names), noise_schedule=noise_schedule)
        self.sampling = SamplingConfig()
        """The settings of a call that gives none of its own."""
        self.ensemble  # noqa: B018 - components that do not fit fail here

    @property
    def experts(self) -> dict[int, ExpertModel]:
        """Return the experts by id."""
        components = {k: getattr(self, expert_name(k)) for k in expert_ids(self.config)}
        loaded = {k: owner_of(component) for k, component in components.items() if component is not None}
        return self._paged | loaded

    @property
    def pager(self) -> ExpertPager | None:
        """Return what loads experts by need; None if all are loaded."""
        return next((expert.pager for expert in self._paged.values()), None)

    def residency(self, selection: SelectionName | SelectionConfig | None = None) -> tuple[Residency, str]:
        """Return how the experts share the memory under a selection, and why."""
        if self.pager is None:
            return "all", "all experts are loaded"
        folders = {k: expert.folder for k, expert in self._paged.items()}
        return choose_residency(folders, self.pager.max_bytes, keeps_expert=self._selection(selection).name == "sticky")

    @property
    def ensemble(self) -> Ensemble:
        """Return the experts, the router and their velocity field."""
        return Ensemble(
            experts=self.experts,
            noise_schedule=NOISE_SCHEDULES[self.config.noise_schedule],
            router=owner_of(self.router),
        )

    @property
    def num_classes(self) -> int:
        """Return the number of classes of the condition; 0 without labels."""
        return next(iter(self.experts.values())).num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes; empty for an unconditional model."""
        return tuple(self.config.class_names)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return the shape of one latent, without the batch."""
        shape: tuple[int, ...] = owner_of(self.codec).latent_shape
        return shape

    @property
    def interrupt(self) -> bool:
        """Return whether a callback stopped the call by setting `_interrupt`."""
        return bool(self._interrupt)

    @property
    def num_timesteps(self) -> int:
        """Return the number of velocity evaluations of the latest call."""
        return int(self._num_timesteps)

    @torch.no_grad()
    def __call__(  # noqa: PLR0913 - the arguments of diffusers' pipelines
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        *,
        class_labels: ClassLabel | Sequence[ClassLabel] = None,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guider: Any = None,
        weak: "EnsembleDiffusionPipeline | None" = None,
        selection: SelectionName | SelectionConfig | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PipelineOutput | tuple[Any]:
        """Sample one image per seed, generator, prompt or class label.

        `height` and `width` are in pixels; other sizes than that of the training need `sticky`, a codec on a grid and
        networks that take any size. Noise comes from `seeds`, from one generator an image, or is `latents`.
        `guidance_scale` 1 means no guidance, and `guidance_interval` is the smallest and largest t with it; `guider` is
        one of `diffusers.guiders` instead. `weak` is the weak model of autoguidance. `sigmas` are the t of the steps,
        without 0. A callback gets `latents`, `prompt_embeds` and `gates` as requested, of the images of the current
        batch, and may return new ones.

        Settings that are not given are those of the run, or `SamplingConfig`'s defaults. Raises `PromptError` for an
        unknown class or a prompt without text encoder, `PipelineError` for settings or a scheduler that the experts do
        not support, and `ValueError` for inputs that do not pair, no image, no step or an unknown type.
        """
        check_output_type(output_type)
        count = count_images(
            num_images_per_prompt,
            prompt=prompt,
            class_labels=class_labels,
            seeds=seeds,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
        )
        encoder = owner_of(self.text_encoder)
        text = embed_prompts(prompt, prompt_embeds, prompt_attention_mask, pooled_prompt_embeds, encoder)
        negative_text = embed_prompts(
            negative_prompt,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
            negative_pooled_prompt_embeds,
            encoder,
        )
        rule, codec = self._selection(selection), self._codec(height, width, selection)
        ids, device = class_ids(class_labels, count, self.class_names, self.num_classes), self._execution_device
        condition = make_condition(ids, repeat_text(text, count), device, self.dtype)
        negative = make_condition(torch.full_like(ids, -1), repeat_text(negative_text, count), device, self.dtype)
        request = Request(
            condition=condition,
            negative=negative,
            noise=Noise.from_inputs(count, codec.latent_shape, seeds, generator, latents),
            selection=rule,
            guidance=self._guidance(condition, negative, guidance_scale, guidance_interval, guider, weak),
            steps=self._steps(num_inference_steps),
            sigmas=sigmas,
            tokens=self._count_tokens(codec.latent_shape),
            callback=callback_on_step_end,
            callback_inputs=getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs),
        )
        self._check_callback(request.callback_inputs)
        self._interrupt = False
        clean, calls = sample_latents(self, request)
        images = clean if output_type == "latent" else self._decode(codec, clean, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return PipelineOutput(images=images, latents=clean, call_counts=calls)

    def _decode(self, codec: Any, latents: Latents, output_type: OutputType) -> Any:
        """Decode latents in batches and convert the images."""
        parts = [codec.decode(part).float().cpu() for part in torch.split(latents.float(), self.sampling.batch_size)]
        return to_output(torch.cat(parts).clamp(0, 1), output_type)

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the experts' weights."""
        if self.pager is not None:
            return self.pager.dtype or torch.float32
        network: Any = next(network for expert in self.experts.values() for network in expert.networks())
        parameter = next(iter(network.parameters()), torch.empty(0))
        return parameter.dtype if parameter.is_floating_point() else torch.float32

    def to(self, *args: Any, **kwargs: Any) -> "EnsembleDiffusionPipeline":
        """Move or convert the networks in place, as `DiffusionPipeline.to` does, and those that are loaded later.

        An autoencoder and a text encoder stay in float32, in which the latents and texts of the training were computed.
        """
        dtype = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)), None)
        super().to(*args, **kwargs)
        for component in (self.codec, self.text_encoder):
            if isinstance(component, nn.Module):
                component.float()
        if self.pager is not None:
            self.pager.move(self.device, dtype or self.dtype)
        return self

    def _selection(self, selection: SelectionName | SelectionConfig | None) -> SelectionConfig:
        if selection is None:
            return self.sampling.selection if self.router is not None else SelectionConfig(name="full")
        if isinstance(selection, SelectionConfig):
            return selection
        check_selection(selection)
        return SelectionConfig(name=selection)

    def _steps(self, steps: int | None) -> int:
        few_step = self.ensemble.few_step
        if few_step is not None and steps is not None:
            raise PipelineError(
                f"num_inference_steps is for experts that accept any t; these have {len(few_step.times)} steps: "
                "leave it out"
            )
        if steps is not None and steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1; got {steps}")
        return self.sampling.steps if steps is None else steps

    def _guidance(
        self,
        condition: Condition,
        negative: Condition,
        scale: float | None,
        interval: tuple[float, float],
        guider: Any,
        weak: "EnsembleDiffusionPipeline | None",
    ) -> Guidance:
        few_step = self.ensemble.few_step
        is_distilled = few_step is not None and few_step.is_distilled
        includes_guidance = self.ensemble.includes_guidance
        if (includes_guidance and scale is not None) or (is_distilled and (guider is not None or weak is not None)):
            raise PipelineError(
                "guidance is part of these distilled students; leave guidance_scale, guider and weak out"
            )
        if weak is not None and negative.text is not None:
            raise PipelineError("guidance leads away from a weak model or a negative prompt; leave one of them out")
        if scale is not None and guider is not None:
            raise PipelineError("a guider has a scale of its own; leave guidance_scale out")
        if includes_guidance or (weak is None and bool(condition.is_null.all())):
            return Guidance()
        default = self.sampling.guidance_scale if scale is None else scale
        return Guidance(scale=default, interval=interval, guider=guider, weak=weak and weak.ensemble)

    def _check_callback(self, names: Sequence[str]) -> None:
        if unknown := sorted(set(names) - set(self._callback_tensor_inputs)):
            raise PipelineError(
                f"a callback can get {', '.join(self._callback_tensor_inputs)}; got {', '.join(unknown)}"
            )

    def _codec(self, height: int | None, width: int | None, selection: SelectionName | SelectionConfig | None) -> Any:
        """Return the codec of images of this size; raise `PipelineError` if codec, networks or router have one size."""
        needs_router = self.router is not None and self._selection(selection).name != "sticky"
        return size_codec(owner_of(self.codec), self._first_network(), (height, width), needs_router=needs_router)

    def _first_network(self) -> Any:
        expert = next(iter(self.experts.values()))
        expert = expert.pager.get(expert) if isinstance(expert, PagedExpert) else expert
        return next(expert.networks())

    def _count_tokens(self, latent_shape: tuple[int, ...]) -> int:
        """Return the number of tokens of one latent, on which a dynamic shift depends."""
        *_, height, width = (1, 1, *latent_shape)
        network = self._first_network()
        patch = PACKED_SIDE if ADAPTERS[type(network).__name__].packs else getattr(network.config, "patch_size", 1)
        return height * width // int(patch or 1) ** 2
