"""What the endpoint of images does with one request, from its body to its response."""

import asyncio
import base64
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ddm_core.errors import DDMError
from ensemble.sampling.prompts import PromptError
from orchestrator.serving.backend import ServingBackend
from orchestrator.serving.config import ServiceConfig
from orchestrator.serving.errors import ServingError, error_body
from orchestrator.serving.generation import Admission, GeneratedImage, PreviewImage, generate, within
from orchestrator.serving.metrics import ServiceMetrics
from orchestrator.serving.request import Generation, ImageRequest, ModelFacts, check_request

log = logging.getLogger(__name__)


class ImageService:
    """Checks, admits and answers requests, and counts them."""

    def __init__(self, backend: ServingBackend, config: ServiceConfig) -> None:
        """Take a backend that is ready."""
        self.backend, self.config, self.metrics = backend, config, ServiceMetrics()
        self.admission = Admission(config.limits, self.metrics)

    async def generate(self, body: ImageRequest, request: Request) -> Response:
        """Return the images of a request in OpenAI's form, or the stream of its previews and images.

        Raises `ServingError` or `PromptError` for a refused request.
        """
        with self._counted("unknown") as outcome:
            facts = find_model(self.backend, body.model)
            outcome.model = facts.name
            generation = check_request(body, facts, self.config.limits)
            if body.compression is not None:
                check_request(
                    body.model_copy(update={"compression": None}),
                    self.backend.facts[generation.model],
                    self.config.limits,
                )
            if self.config.log_prompts:
                log.info("%s: %r", facts.name, generation.prompt)
            if body.stream:
                self.admission.check(len(generation.seeds))
                outcome.status = 0
                return StreamingResponse(self._stream(generation, request), media_type="text/event-stream")
            with self.admission.admit(len(generation.seeds)):
                work = generate(self.backend, generation)
                images = await within(work, self.config.limits.deadline_s, request)
            self.metrics.images.labels(facts.name).inc(len(images))
            outcome.status = 200
            return JSONResponse(to_response(images, generation, as_url=body.response_format == "url"))

    async def _stream(self, generation: Generation, request: Request) -> AsyncIterator[str]:
        """Yield server-sent events: previews and images as they become ready, or one error."""
        events: asyncio.Queue[PreviewImage | GeneratedImage | None] = asyncio.Queue()
        try:
            with self._counted(generation.model) as outcome, self.admission.admit(len(generation.seeds)):
                work = within(
                    generate(self.backend, generation, events.put_nowait), self.config.limits.deadline_s, None
                )
                task = asyncio.create_task(work)
                task.add_done_callback(lambda _task: events.put_nowait(None))
                try:
                    while (event := await events.get()) is not None:
                        yield to_event(event, generation)
                    self.metrics.images.labels(generation.model).inc(len(task.result()))
                    outcome.status = 200
                finally:
                    task.cancel()
        except ServingError as error:
            yield f"event: error\ndata: {json.dumps(error.to_json())}\n\n"
        except DDMError as error:
            yield f"event: error\ndata: {json.dumps(error_body(str(error), 500))}\n\n"

    @contextlib.contextmanager
    def _counted(self, model: str) -> Iterator["Outcome"]:
        """Count a request, and its time, under the status that it has at the end; 0 leaves it out."""
        outcome, start_s = Outcome(model), time.monotonic()
        try:
            yield outcome
        except ServingError as error:
            outcome.status = error.status
            raise
        except PromptError:
            outcome.status = 400
            raise
        finally:
            if outcome.status:
                self.metrics.requests.labels(outcome.model, outcome.status).inc()
                self.metrics.seconds.labels(outcome.model).observe(time.monotonic() - start_s)


@dataclass(slots=True)
class Outcome:
    """How a request ends."""

    model: str
    status: int = 500


def find_model(backend: ServingBackend, name: str | None) -> ModelFacts:
    """Return a model by its name, the first one without a name; raise `ServingError` 404 with the known ones."""
    facts = next(iter(backend.facts.values())) if name is None else backend.facts.get(name)
    if facts is None:
        known = ", ".join(backend.facts)
        raise ServingError(
            f"there is no model {str(name)[:80]!r} here; known: {known}", 404, param="model", code="model_not_found"
        )
    return facts


def describe_model(facts: ModelFacts) -> dict[str, Any]:
    """Return a model in OpenAI's form, with what requests may want of it."""
    return {
        "id": facts.name,
        "object": "model",
        "created": facts.created,
        "owned_by": "ddm",
        "size": f"{facts.width}x{facts.height}",
        "has_text": facts.has_text,
        "class_names": facts.class_names,
        "num_classes": facts.num_classes,
        "experts": facts.experts,
        "steps": facts.steps,
        "guidance_scale": facts.guidance_scale,
        "selection": facts.selection,
        "selections": facts.selections,
        "adapters": facts.adapters,
        "compressions": facts.compressions,
    }


def to_event(image: PreviewImage | GeneratedImage, generation: Generation) -> str:
    """Return a preview or an image as a server-sent event in OpenAI's form."""
    own: dict[str, Any]
    if isinstance(image, GeneratedImage):
        kind, own = "image_generation.completed", {"seed": image.seed, "expert": image.expert}
    else:
        kind, own = "image_generation.partial_image", {"partial_image_index": image.number}
    data = {
        "type": kind,
        "b64_json": base64.b64encode(image.file).decode("ascii"),
        "created_at": int(time.time()),
        "output_format": generation.output_format,
        "index": image.index,
        **own,
    }
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


def to_response(images: list[GeneratedImage], generation: Generation, *, as_url: bool) -> dict[str, Any]:
    """Return images in OpenAI's form, with the seed and the expert of each."""
    data = []
    for image in images:
        text = base64.b64encode(image.file).decode("ascii")
        field = {"url": f"data:image/{generation.output_format};base64,{text}"} if as_url else {"b64_json": text}
        data.append({**field, "seed": image.seed, "expert": image.expert})
    return {"created": int(time.time()), "data": data, "output_format": generation.output_format}
