"""One model of the service: from a checked request to the jobs of its images, to latents, to files.

Every network is called on numbers of rows that give equal bits, so an image has the same bytes whatever it is batched
with. The expert of a sticky image is known before it is sampled; a batch has the images of one expert.
"""

import hashlib
import io
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from data_partition.shards.images import Pixels, to_image
from ensemble.ensemble import Ensemble, RouterModel
from ensemble.pipeline import EnsemblePipeline
from ensemble.pipelines.paging import ExpertPager, PagedExpert
from ensemble.sampling.exact_rows import ExactExpert, ExactRouter, RowCounts, call_rows, find_row_counts
from ensemble.sampling.guidance import guided_velocity, reflected_solver
from ensemble.sampling.images import to_bytes
from ensemble.sampling.prompts import Prompts, find_class
from ensemble.solvers import SOLVERS, make_noise, sample_few_step, uniform_times
from experts.conditions.condition import Condition
from experts.diffusion.predictions import to_clean
from experts.expert_model import ExpertModel
from experts.networks.lora import Lora, check_lora, read_lora
from experts.types import Latents, RowIds
from orchestrator.serving.request import Generation, ModelFacts, OutputFormat
from orchestrator.serving.sources import ModelSource
from router.config import SelectionConfig

ANY_EXPERT = -1
"""The expert of images that may change theirs on the way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchKey:
    """What the images of one batch have in common."""

    model: str
    expert: int
    steps: int
    guidance_scale: float
    selection: SelectionConfig
    adapter: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageJob:
    """One image to sample."""

    seed: int
    condition: Condition
    """One row."""
    negative: Condition
    """One row, of the unconditional branch of guidance."""


@dataclass(frozen=True, slots=True)
class ServedLora:
    """A LoRA of some experts."""

    name: str
    """Of its files: models of the same folder share experts, and may have other adapters of the same name."""
    loras: Mapping[int, Lora]


NO_ADAPTER = ServedLora("", {})

Preview = Callable[[Latents, float], None]
"""Called with the clean estimate of all images of a batch and t, at every evaluation of the velocity."""


@dataclass(slots=True, kw_only=True)
class ServedModel:
    """A loaded model; its experts are loaded when they are called, as many as the pager allows."""

    source: ModelSource
    pipeline: EnsemblePipeline
    facts: ModelFacts
    """What requests are checked against."""
    max_images: int
    """Most images of a batch."""
    adapters: Mapping[str, "ServedLora"] = field(default_factory=dict)
    """Injected into an expert when they are first used; other batches do not see them."""
    weak: Ensemble | None = None
    """Of the reflection that the source has."""
    _experts: dict[tuple[int, str | None], ExpertModel] = field(default_factory=dict)
    _row_counts: dict[Hashable, RowCounts] = field(default_factory=dict)
    _router: ExactRouter | None = None
    _exact_weak: Ensemble | None = None
    _decoder_rows: RowCounts | None = None
    _conditions: dict[tuple[str, int], Condition] = field(default_factory=dict)

    @classmethod
    def open(
        cls, source: ModelSource, max_images: int, pager: ExpertPager | None = None, *, needs_experts: bool = True
    ) -> "ServedModel":
        """Open a pipeline's folder; with a pager its experts are not loaded yet, and without `needs_experts` no others.

        Raises an `ArtifactError` for a folder that cannot be loaded, `AdapterError` for an adapter that does not fit.
        """
        load = None if pager is None else partial(PagedExpert.open, pager=pager)
        pipeline = EnsemblePipeline.from_pretrained(source.folder, load)
        return cls(
            source=source,
            pipeline=pipeline,
            facts=_describe(source, pipeline),
            max_images=max_images,
            adapters=read_adapters(source) if needs_experts else {},
            weak=pipeline.load_weak(source.sampling) if needs_experts and pipeline.ensemble.few_step is None else None,
        )

    # From a request to jobs

    @torch.inference_mode()
    def plan(self, generation: Generation) -> list[tuple[BatchKey, ImageJob]]:
        """Return the batch key and the job of each image; raise `PromptError` for an unknown class."""
        class_id = -1 if generation.class_label is None else find_class(generation.class_label, self._class_names())
        condition = self._condition(generation.prompt, class_id)
        negative = self._condition(generation.negative_prompt, -1)
        key = BatchKey(
            model=self.source.name,
            expert=ANY_EXPERT,
            steps=self.facts.steps if generation.steps is None else generation.steps,
            guidance_scale=self._guidance_scale(generation, condition),
            selection=self._selection(generation.selection),
            adapter=generation.adapter,
        )
        jobs = [ImageJob(seed=seed, condition=condition, negative=negative) for seed in generation.seeds]
        return [(replace(key, expert=self._draw_expert(job, key.selection)), job) for job in jobs]

    def _class_names(self) -> Sequence[str]:
        return self.pipeline.class_names or [str(k) for k in range(self.pipeline.num_classes)]

    def _condition(self, prompt: str, class_id: int) -> Condition:
        """Encode one prompt, on its own: among others its bits could differ. The last ones are kept."""
        key = (prompt if prompt.strip() else "", class_id)
        if key not in self._conditions:
            if len(self._conditions) >= 1024:
                self._conditions.pop(next(iter(self._conditions)))
            self._conditions[key] = self.pipeline.condition(Prompts((class_id,), (key[0],)))
        return self._conditions[key]

    def _guidance_scale(self, generation: Generation, condition: Condition) -> float:
        if not self.facts.has_guidance or bool(condition.is_null.all()):
            return 1.0
        scale = generation.guidance_scale
        return self.source.sampling.guidance_scale if scale is None else scale

    def _selection(self, name: str | None) -> SelectionConfig:
        if self.pipeline.ensemble.router is None:
            return SelectionConfig(name="full")
        return self.source.sampling.selection if name is None else self.source.selections[name]

    def _draw_expert(self, job: ImageJob, selection: SelectionConfig) -> int:
        """Return the expert of a sticky image, and that of a model with one; else `ANY_EXPERT`."""
        ensemble = self.pipeline.ensemble
        if len(ensemble.experts) == 1:
            return next(iter(ensemble.experts))
        if selection.name != "sticky":
            return ANY_EXPERT
        return int(ensemble.init_routing([job.seed], job.condition, selection).gates.argmax())

    # From jobs to latents

    @torch.inference_mode()
    def denoise(self, key: BatchKey, jobs: Sequence[ImageJob], preview: Preview | None = None) -> list[Latents]:
        """Return the clean latents of each image, one row each; one by one if the experts' rows are not independent."""
        ensemble, weak, seeds = self._ensemble(key), self._weak_ensemble(key), [job.seed for job in jobs]
        experts = [*ensemble.experts.values(), *(weak.experts.values() if weak else ())]
        if len(jobs) > 1 and not all(map(_has_independent_rows, experts)):
            return [latents for job in jobs for latents in self.denoise(key, [job])]
        condition = Condition.concatenate([job.condition for job in jobs])
        negative = Condition.concatenate([job.negative for job in jobs])
        routing = ensemble.init_routing(seeds, condition, key.selection)
        guided = guided_velocity(ensemble, condition, routing, key.guidance_scale, negative=negative)

        def noise(index: int) -> Latents:
            return make_noise(seeds, self.pipeline.codec.latent_shape, index)

        def velocity(noised: Latents, t: torch.Tensor) -> Latents:
            slope = guided(noised, t)
            if preview is not None:
                preview(to_clean("velocity", slope, noised, t, ensemble.noise_schedule), float(t[0]))
            return slope

        initial = ensemble.initial_latents(noise, condition, routing)
        if (few_step := ensemble.few_step) is None:
            times = uniform_times(key.steps, ensemble.t_shift)
            solver = SOLVERS[self.source.sampling.solver]
            if weak is not None and (reflection := self.source.sampling.reflection) is not None:
                weak_routing = weak.init_routing(seeds, condition, key.selection)
                weak_velocity = guided_velocity(weak, condition, weak_routing, key.guidance_scale, negative=negative)
                solver = reflected_solver(self.source.sampling.solver, guided, weak_velocity, reflection.steps)
            clean = solver(velocity, initial, times)
        else:
            clean = sample_few_step(velocity, initial, few_step, ensemble.noise_schedule, lambda step: noise(1 + step))
        return list(torch.split(clean, 1))

    def _ensemble(self, key: BatchKey) -> Ensemble:
        """Return the experts of a batch, and a router that knows no others, so that a sticky image keeps its own."""
        ensemble = self.pipeline.ensemble
        ids = sorted(ensemble.experts) if key.expert == ANY_EXPERT else [key.expert]
        return replace(ensemble, experts={k: self._expert(k, key.adapter) for k in ids}, router=self._exact_router())

    def _expert(self, k: int, adapter: str | None) -> ExpertModel:
        """Return an expert with this adapter alone, until the next call."""
        expert, lora = self.pipeline.ensemble.experts[k], self.adapters.get(adapter or "", NO_ADAPTER).loras.get(k)
        if isinstance(expert, PagedExpert) and (lora is not None or expert.adapter_names):
            name = self.adapters[adapter or ""].name if lora is not None else ""
            if lora is not None and name not in expert.adapter_names:
                expert.add_lora(lora, name, 1.0)
            expert.set_adapters({} if lora is None else {name: 1.0})
        if (k, adapter) not in self._experts:
            self._experts[k, adapter] = self._exact_expert(expert, adapter)
        return self._experts[k, adapter]

    def _weak_ensemble(self, key: BatchKey) -> Ensemble | None:
        """Return the weak ensemble of a reflection; one expert of this ensemble has the adapter of the batch."""
        reflection, weak = self.source.sampling.reflection, self.weak
        if reflection is None or weak is None:
            return None
        if reflection.weak == "expert":
            return replace(weak, experts={0: self._expert(reflection.expert_id, key.adapter)})
        if self._exact_weak is None:
            router = None if weak.router is None else self._measure_router(weak.router)
            experts = {k: self._exact_expert(expert, None) for k, expert in weak.experts.items()}
            self._exact_weak = replace(weak, experts=experts, router=router)
        return self._exact_weak

    def _exact_expert(self, expert: ExpertModel, adapter: str | None) -> ExpertModel:
        """Wrap an expert that keeps no state by row; those with equal networks are measured once."""
        if expert.needs_cache or expert.has_draft:
            return expert
        loaded = expert.pager.get(expert) if isinstance(expert, PagedExpert) else expert
        shapes = (
            adapter,
            tuple(
                (type(network).__name__, name, value.shape, value.dtype)
                for network in loaded.networks()
                for name, value in network.state_dict().items()
            ),
        )
        if shapes not in self._row_counts:
            exact = ExactExpert.measure(expert, self.pipeline.ensemble.noise_schedule, 2 * self.max_images)
            self._row_counts[shapes] = exact.row_counts
        return ExactExpert(expert=expert, row_counts=self._row_counts[shapes])

    def _exact_router(self) -> ExactRouter | None:
        router = self.pipeline.ensemble.router
        if self._router is None and router is not None:
            self._router = self._measure_router(router)
        return self._router

    def _measure_router(self, router: RouterModel) -> ExactRouter:
        return ExactRouter.measure(router, self.pipeline.codec.latent_shape, 2 * self.max_images)

    # From latents to files

    @torch.inference_mode()
    def decode(self, latents: Sequence[Latents], formats: Sequence[tuple[OutputFormat, int]]) -> list[bytes]:
        """Return each image as a file of its format and quality."""
        rows = torch.cat(list(latents))
        if self._decoder_rows is None:
            noised = make_noise(range(self.max_images), self.pipeline.codec.latent_shape)
            self._decoder_rows = find_row_counts(lambda index: self.pipeline.codec.decode(noised[index]), len(noised))

        def call(index: RowIds) -> torch.Tensor:
            return self.pipeline.codec.decode(rows[index]).float()

        if self._decoder_rows:
            images = call_rows(call, torch.arange(len(rows)), self._decoder_rows)
        else:
            images = torch.cat([call(torch.tensor([row])) for row in range(len(rows))])
        pixels = to_bytes(images)
        return [_encode(each, *form) for each, form in zip(pixels, formats, strict=True)]


def read_adapters(source: ModelSource) -> dict[str, ServedLora]:
    """Read the adapters of a model; raise `AdapterError` for a file that is none or does not fit its expert."""
    adapters = {}
    for name, files in source.adapters.items():
        loras = {path: read_lora(path) for path in set(files.values())}
        for k, path in files.items():
            check_lora(source.folder / f"expert_{k}", loras[path], name)
        digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
        adapters[name] = ServedLora(digest, {k: loras[path] for k, path in files.items()})
    return adapters


def _describe(source: ModelSource, pipeline: EnsemblePipeline) -> ModelFacts:
    """Return what requests for a model are checked against."""
    sampling, few_step = source.sampling, pipeline.ensemble.few_step
    height, width, _ = pipeline.codec.image_shape
    return ModelFacts(
        name=source.name,
        created=int(source.folder.stat().st_mtime),
        width=width,
        height=height,
        class_names=pipeline.class_names,
        num_classes=pipeline.num_classes,
        has_text=pipeline.text is not None and pipeline.text.kind != "none",
        experts=len(pipeline.ensemble.experts),
        steps=sampling.steps if few_step is None else len(few_step.times),
        guidance_scale=sampling.guidance_scale,
        selection=sampling.selection.name,
        selections=tuple(source.selections),
        is_few_step=few_step is not None,
        has_guidance=not pipeline.ensemble.includes_guidance,
        adapters=tuple(source.adapters),
        compressions=source.compressions,
    )


def _has_independent_rows(expert: ExpertModel) -> bool:
    return isinstance(expert, ExactExpert) and bool(expert.row_counts)


def _encode(pixels: Pixels, output_format: OutputFormat, quality: int) -> bytes:
    """Return an image file; equal pixels give equal bytes."""
    buffer = io.BytesIO()
    options = {} if output_format == "png" else {"quality": quality}
    to_image(pixels).save(buffer, format=output_format.upper(), **options)
    return buffer.getvalue()
