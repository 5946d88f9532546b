"""The backend on Ray Serve: text encoder with router, experts, and decoder are deployments that work side by side.

    request ──► plan ──► denoise (replicas by load, each with its batches and its experts) ──► decode

A replica that dies takes its running batch with it. As an image depends on its seed alone, the front samples it again
elsewhere: an accepted request is not lost.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from ddm_core.environment import environment_variables
from experts.types import Latents
from orchestrator.backends.ray_cluster import RayCluster
from orchestrator.config.compute import ComputeConfig
from orchestrator.serving.backend import Decoder, Denoiser, EmitPreview, Form, list_facts, open_models
from orchestrator.serving.config import Batching, Replicas
from orchestrator.serving.errors import ServingError
from orchestrator.serving.model import BatchKey, ImageJob
from orchestrator.serving.request import Generation, ModelFacts
from orchestrator.serving.sources import ModelSource

Result = TypeVar("Result")

ATTEMPTS = 10
"""How often an image is sampled whose replica dies; more deaths have a lasting cause."""

PAUSE_S = 0.2
"""Wait before an image goes to another replica."""

FIXED_ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""glibc then returns the memory of an expert that is dropped; by default it learns to keep such large pieces."""

LOGGING = LoggingConfig(log_level="ERROR", enable_access_log=False)


class PlanDeployment:
    """Encodes prompts and draws experts."""

    def __init__(self, sources: Sequence[ModelSource], batching: Batching) -> None:
        """Open the models without their experts."""
        torch.set_num_threads(batching.threads)
        self._models = open_models(sources, batching, needs_experts=False)

    async def facts(self) -> dict[str, ModelFacts]:
        """Return what requests are checked against."""
        return list_facts(self._models)

    async def plan(self, generation: Generation) -> list[tuple[BatchKey, ImageJob]]:
        """Return the batch key and the job of each image."""
        return self._models[generation.model].plan(generation)


class DenoiseDeployment:
    """Samples latents; the router prefers replicas that have sampled with an expert lately."""

    def __init__(self, sources: Sequence[ModelSource], batching: Batching) -> None:
        """Open the models without their experts, which are loaded when they are called."""
        torch.set_num_threads(batching.threads)
        self._denoiser = Denoiser(open_models(sources, batching), batching)
        experts = batching.resident or -1
        self._hold: Callable[[str], Any] = serve.multiplexed(max_num_models_per_replica=experts)(_hold).__get__(self)

    async def denoise(self, key: BatchKey, job: ImageJob) -> Latents:
        """Return the clean latents of an image, one row."""
        await self._hold(expert_label(key))
        return await self._denoiser.denoise(key, job, 0, lambda _latents: None)

    async def stream(self, key: BatchKey, job: ImageJob, previews: int) -> AsyncIterator[tuple[bool, Latents]]:
        """Yield previews, and at last (True, clean latents)."""
        await self._hold(expert_label(key))
        queue: asyncio.Queue[Latents | None] = asyncio.Queue()
        task = asyncio.create_task(self._denoiser.denoise(key, job, previews, queue.put_nowait))
        task.add_done_callback(lambda _task: queue.put_nowait(None))
        try:
            while (latents := await queue.get()) is not None:
                yield False, latents
            yield True, task.result()
        finally:
            task.cancel()


async def _hold(_self: Any, label: str) -> str:
    """Return the label: Serve keeps the latest ones, and routes by them; the pager keeps the experts themselves."""
    return label


class DecodeDeployment:
    """Turns latents into files."""

    def __init__(self, sources: Sequence[ModelSource], batching: Batching) -> None:
        """Open the models without their experts."""
        torch.set_num_threads(batching.threads)
        self._decoder = Decoder(open_models(sources, batching, needs_experts=False), batching)

    async def decode(self, model: str, latents: Latents, form: Form) -> bytes:
        """Return an image as a file."""
        return await self._decoder.decode(model, latents, form)


def expert_label(key: BatchKey) -> str:
    """Return the name by which requests are routed to replicas that hold their expert."""
    return f"{key.model}/{key.expert}"


@dataclass(slots=True)
class RayServeBackend:
    """Handles of the three deployments, which end with `close`, and an embedded cluster with them."""

    facts: Mapping[str, ModelFacts]
    _cluster: RayCluster
    _plan: Any
    _denoise: Any
    _decode: Any

    @classmethod
    def start(
        cls, sources: Sequence[ModelSource], batching: Batching, replicas: Replicas, queue: int, address: str | None
    ) -> "RayServeBackend":
        """Start Ray on loopback, or connect to a cluster, and start the deployments; wait until they have the models.

        Raises `OrchestratorError` if Ray does not start or respond, and `ServingError` for a model that a deployment
        cannot open.
        """
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        with environment_variables(FIXED_ALLOCATION):
            cluster = RayCluster(ComputeConfig(cpus=replicas.most + 1, address=address))
        try:
            serve.start(proxy_location="Disabled", logging_config=LOGGING)
            scaling = {
                "min_replicas": replicas.least,
                "initial_replicas": max(1, replicas.least),
                "max_replicas": replicas.most,
                "target_ongoing_requests": batching.max_images,
                "downscale_delay_s": replicas.idle_s,
                "downscale_to_zero_delay_s": replicas.idle_s,
            }
            targets = [
                _target("plan", PlanDeployment, (sources, batching), queue, num_replicas=1),
                _target("denoise", DenoiseDeployment, (sources, batching), queue, autoscaling_config=scaling),
                _target("decode", DecodeDeployment, (sources, batching), queue, num_replicas=1),
            ]
            plan, denoise, decode = serve.run_many(targets)
            return cls(plan.facts.remote().result(), cluster, plan, denoise, decode)
        except RayServeException as error:
            cluster.close()
            raise ServingError(f"the deployments did not start: {error}") from error
        except BaseException:
            cluster.close()
            raise

    def close(self) -> None:
        """End the deployments and an embedded cluster; other applications of a cluster stay."""
        if self._cluster.is_embedded:
            serve.shutdown()
        else:
            for handle in (self._plan, self._denoise, self._decode):
                serve.delete(handle.app_name)
        self._cluster.close()

    async def plan(self, generation: Generation) -> list[tuple[BatchKey, ImageJob]]:
        """Return the batch key and the job of each image."""
        return await _survive(lambda: self._plan.plan.remote(generation))

    async def denoise(self, key: BatchKey, job: ImageJob, previews: int, emit: EmitPreview) -> Latents:
        """Return the clean latents of an image, one row; a replica that holds its expert comes first."""
        handle = self._denoise.options(multiplexed_model_id=expert_label(key))
        if not previews:
            return await _survive(lambda: handle.denoise.remote(key, job))
        stream = handle.options(stream=True).stream

        async def collect() -> Latents:
            latents: Latents
            async for is_final, latents in stream.remote(key, job, previews):
                if is_final:
                    return latents
                emit(latents)
            raise RayServeException("a replica ended a stream without its image")

        return await _survive(collect)

    async def decode(self, model: str, latents: Latents, form: Form) -> bytes:
        """Return an image as a file."""
        return await _survive(lambda: self._decode.decode.remote(model, latents, form))


def _target(role: str, kind: type, arguments: tuple[Any, ...], queue: int, **options: Any) -> Any:
    """Return a deployment as an application of its own, without a route, beside those of other services."""
    deployment = serve.deployment(
        name=role, max_ongoing_requests=queue, ray_actor_options={"num_cpus": int(role == "denoise")}, **options
    )(kind)
    return serve.RunTarget(deployment.bind(*arguments), f"ddm-{role}-{secrets.token_hex(4)}", None, LOGGING)


async def _survive(call: Callable[[], Awaitable[Result]]) -> Result:
    """Return the result of a call to a replica; call another one if it dies. Raises what the replica raised."""
    attempt = 1
    while True:
        try:
            return await call()
        except RayActorError as error:
            if attempt == ATTEMPTS:
                raise ServingError(
                    f"{ATTEMPTS} replicas died while they worked on this request ({str(error).splitlines()[0]}); a "
                    "frequent cause is too little memory: lower --resident, --max-batch or --replicas",
                    500,
                ) from error
        except RayTaskError as error:
            raise error.cause from error
        await asyncio.sleep(PAUSE_S * attempt)
        attempt += 1
