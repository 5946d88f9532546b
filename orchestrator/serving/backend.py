"""What samples the images of the service: an interface, and its form within this process, without Ray."""

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from ensemble.pipeline_folder import PipelineIndex
from ensemble.pipelines.paging import ExpertPager, weight_bytes
from experts.compressed.quantization.shared_weight_io import SHARED
from experts.expert import METADATA_FILE
from experts.types import Latents
from orchestrator.errors import ConfigError
from orchestrator.serving.batcher import Batcher
from orchestrator.serving.config import Batching
from orchestrator.serving.model import BatchKey, ImageJob, ServedModel
from orchestrator.serving.request import Generation, ModelFacts, OutputFormat
from orchestrator.serving.sources import ModelSource

Form = tuple[OutputFormat, int]
"""Format and quality of a file."""
ROUNDING = 1e-6
"""Of t in float32."""
EmitPreview = Callable[[Latents], None]
"""Called in the event loop with the clean estimate of one image."""


class ServingBackend(Protocol):
    """Plans, samples and decodes images; cancelled before it starts, a job is never run."""

    @property
    def facts(self) -> Mapping[str, ModelFacts]:
        """Return what requests are checked against, by the names of the models."""

    async def plan(self, generation: Generation) -> list[tuple[BatchKey, ImageJob]]:
        """Return the batch key and the job of each image."""

    async def denoise(self, key: BatchKey, job: ImageJob, previews: int, emit: EmitPreview) -> Latents:
        """Return the clean latents of an image, one row, after so many previews."""

    async def decode(self, model: str, latents: Latents, form: Form) -> bytes:
        """Return an image as a file."""


def open_models(
    sources: Sequence[ModelSource], batching: Batching, *, needs_experts: bool = True
) -> dict[str, ServedModel]:
    """Open models by name; experts are loaded when they are called, without `needs_experts` one at a time.

    Experts that share weights or have several networks each are loaded at once.

    Raises an `ArtifactError` for a folder that cannot be loaded, and `ConfigError` for experts that are not paged.
    """
    pager = open_pager(sources, batching.resident if needs_experts else 1)
    models = {}
    for source in sources:
        is_paged = can_page(source.folder)
        weak = source.sampling.reflection
        if batching.resident is not None and weak is not None and weak.weak == "early":
            raise ConfigError(
                f"{source.name} reflects with the earlier checkpoints of all experts, which stay in memory; leave "
                "--resident out"
            )
        if (batching.resident is not None or source.adapters) and not is_paged:
            raise ConfigError(
                f"the experts of {source.name} share weights or have several networks; leave --resident and --adapter "
                "out"
            )
        models[source.name] = ServedModel.open(
            source, batching.max_images, pager if is_paged else None, needs_experts=needs_experts
        )
    return models


def list_facts(models: Mapping[str, ServedModel]) -> dict[str, ModelFacts]:
    """Return what requests are checked against, by the names of the models and of each with an adapter."""
    return {name: facts for model in models.values() for name, facts in model.facts.with_adapters().items()}


def can_page(folder: Path) -> bool:
    """Return whether every expert of a pipeline is a network of its own, which can be loaded alone."""
    ids = PipelineIndex.read(folder).expert_ids
    return not (folder / SHARED).is_dir() and all((folder / f"expert_{k}" / METADATA_FILE).is_file() for k in ids)


def open_pager(sources: Sequence[ModelSource], resident: int | None) -> ExpertPager:
    """Return what keeps at most so many experts in memory, of all models together; None keeps all."""
    folders = [folder for source in sources for folder in source.folder.glob("expert_*")]
    if resident is None:
        return ExpertPager(max_bytes=sys.maxsize)
    return ExpertPager(max_bytes=resident * max(map(weight_bytes, folders), default=0))


class Denoiser:
    """Samples images of all models on one thread, in batches of one expert."""

    def __init__(self, models: Mapping[str, ServedModel], batching: Batching) -> None:
        """Take opened models."""
        self._models, self._pool = models, ThreadPoolExecutor(1, "denoise")
        self._batcher: Batcher[BatchKey, tuple[ImageJob, int, EmitPreview], Latents] = Batcher(
            run=self._run, max_jobs=batching.max_images, wait_s=batching.wait_s
        )

    async def denoise(self, key: BatchKey, job: ImageJob, previews: int, emit: EmitPreview) -> Latents:
        """Return the clean latents of an image, one row."""
        return await self._batcher.submit(key, (job, previews, emit))

    async def _run(self, key: BatchKey, jobs: Sequence[tuple[ImageJob, int, EmitPreview]]) -> list[Latents]:
        loop, due = asyncio.get_running_loop(), [0] * len(jobs)

        def preview(clean: Latents, t: float) -> None:
            for row, (_, previews, emit) in enumerate(jobs):
                if due[row] < previews and 1 - t >= (due[row] + 1) / (previews + 1) - ROUNDING:
                    due[row] += 1
                    loop.call_soon_threadsafe(emit, clean[row : row + 1].clone())

        denoise = self._models[key.model].denoise
        watch = preview if any(previews for _, previews, _ in jobs) else None
        return await loop.run_in_executor(self._pool, denoise, key, [job for job, _, _ in jobs], watch)


class Decoder:
    """Decodes latents of all models on one thread, those that wait together."""

    def __init__(self, models: Mapping[str, ServedModel], batching: Batching) -> None:
        """Take opened models."""
        self._models, self._pool = models, ThreadPoolExecutor(1, "decode")
        self._batcher: Batcher[str, tuple[Latents, Form], bytes] = Batcher(
            run=self._run, max_jobs=batching.max_images, wait_s=0.0
        )

    async def decode(self, model: str, latents: Latents, form: Form) -> bytes:
        """Return an image as a file."""
        return await self._batcher.submit(model, (latents, form))

    async def _run(self, model: str, jobs: Sequence[tuple[Latents, Form]]) -> list[bytes]:
        loop, arguments = asyncio.get_running_loop(), [list(part) for part in zip(*jobs, strict=True)]
        decode: Any = self._models[model].decode
        return await loop.run_in_executor(self._pool, decode, *arguments)


class LocalBackend:
    """Everything in this process: for one small machine, and for tests."""

    def __init__(self, sources: Sequence[ModelSource], batching: Batching) -> None:
        """Open the models; raises an `ArtifactError` for a folder that cannot be loaded."""
        models = open_models(sources, batching)
        self._facts = list_facts(models)
        self._models, self._pool = models, ThreadPoolExecutor(1, "plan")
        self._denoiser, self._decoder = Denoiser(models, batching), Decoder(models, batching)

    @property
    def facts(self) -> Mapping[str, ModelFacts]:
        """Return what requests are checked against, by the names of the models."""
        return self._facts

    async def plan(self, generation: Generation) -> list[tuple[BatchKey, ImageJob]]:
        """Return the batch key and the job of each image."""
        plan = self._models[generation.model].plan
        return await asyncio.get_running_loop().run_in_executor(self._pool, plan, generation)

    async def denoise(self, key: BatchKey, job: ImageJob, previews: int, emit: EmitPreview) -> Latents:
        """Return the clean latents of an image, one row."""
        return await self._denoiser.denoise(key, job, previews, emit)

    async def decode(self, model: str, latents: Latents, form: Form) -> bytes:
        """Return an image as a file."""
        return await self._decoder.decode(model, latents, form)
