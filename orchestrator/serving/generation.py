"""From a checked request to its images: admission, a deadline, and the end when the client leaves."""

import asyncio
import contextlib
import math
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from experts.types import Latents
from orchestrator.serving.backend import ServingBackend
from orchestrator.serving.config import Limits
from orchestrator.serving.errors import ServingError
from orchestrator.serving.metrics import ServiceMetrics
from orchestrator.serving.model import BatchKey, ImageJob
from orchestrator.serving.request import Generation

Result = TypeVar("Result")
CLIENT_LEFT = 499
"""nginx's status for a client that closed the connection; nobody reads it but the metrics."""


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """An image file, and what it was made from."""

    file: bytes
    seed: int
    expert: int
    """-1 if it may have had several."""
    index: int
    """Position in the request."""


@dataclass(slots=True)
class Admission:
    """Counts the images that wait or are sampled, and refuses more than the limit."""

    limits: Limits
    metrics: ServiceMetrics
    in_flight: int = 0
    seconds_per_image: float = 1.0
    """Moving average of the time between two finished images under load."""

    def check(self, images: int) -> None:
        """Raise `ServingError` 429 if the queue is full."""
        if self.in_flight + images > self.limits.queue:
            wait_s = max(1, math.ceil(self.in_flight * self.seconds_per_image))
            raise ServingError(
                f"{self.in_flight} images wait or are sampled, and at most {self.limits.queue} may; try again in about "
                f"{wait_s} s",
                429,
                code="rate_limit_exceeded",
                retry_s=wait_s,
            )

    @contextlib.contextmanager
    def admit(self, images: int) -> Iterator[None]:
        """Count images while they are generated; raise `ServingError` 429 if the queue is full."""
        self.check(images)
        self.in_flight += images
        self.metrics.in_flight.set(self.in_flight)
        start_s = asyncio.get_running_loop().time()
        try:
            yield
        finally:
            seconds = (asyncio.get_running_loop().time() - start_s) / self.in_flight
            self.seconds_per_image += 0.1 * (seconds - self.seconds_per_image)
            self.in_flight -= images
            self.metrics.in_flight.set(self.in_flight)


@dataclass(frozen=True, slots=True)
class PreviewImage:
    """A file of an unfinished image."""

    file: bytes
    number: int
    """From 0 on, of each image."""
    index: int
    """Position of its image in the request."""


async def generate(
    backend: ServingBackend, generation: Generation, emit: Callable[[PreviewImage | GeneratedImage], None] | None = None
) -> list[GeneratedImage]:
    """Return the images of a request in the order of its seeds; the first error ends them all.

    `emit` is called with every preview and every finished image, in the order in which they become ready.
    """
    form = generation.output_format, generation.quality

    async def one(index: int, key: BatchKey, job: ImageJob) -> GeneratedImage:
        previews: asyncio.Queue[Latents | None] = asyncio.Queue()
        sender = asyncio.create_task(send_previews(index, key.model, previews))
        try:
            latents = await backend.denoise(key, job, generation.previews, previews.put_nowait)
            file = await backend.decode(key.model, latents, form)
            previews.put_nowait(None)
            await sender
        finally:
            sender.cancel()
        image = GeneratedImage(file, job.seed, key.expert, index)
        if emit is not None:
            emit(image)
        return image

    async def send_previews(index: int, model: str, previews: "asyncio.Queue[Latents | None]") -> None:
        number = 0
        while (latents := await previews.get()) is not None:
            file = await backend.decode(model, latents, form)
            if emit is not None:
                emit(PreviewImage(file, number, index))
            number += 1

    planned = enumerate(await backend.plan(generation))
    tasks = [asyncio.create_task(one(index, *each)) for index, each in planned]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def within(work: Coroutine[Any, Any, Result], deadline_s: float, request: Request | None) -> Result:
    """Return the result of `work`, which ends at the deadline and when the client leaves; raise `ServingError` then.

    Without a `request`, whoever awaits this notices that the client has left.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(asyncio.Event().wait() if request is None else _wait_until_gone(request))
    try:
        await asyncio.wait({task, gone}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ServingError("the client closed the connection", CLIENT_LEFT, code="client_left")
        raise ServingError(
            f"the request was not finished within {deadline_s:g} s, and was dropped; try again when the service is "
            "less busy, with fewer images or steps",
            408,
            code="deadline_exceeded",
        )
    finally:
        task.cancel()
        gone.cancel()


async def _wait_until_gone(request: Request) -> bool:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    return True
