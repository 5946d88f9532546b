"""What the endpoint of images does with one request, from its body to its response."""

import base64
import logging
import time
from typing import Any

from starlette.requests import Request

from ensemble.sampling.prompts import PromptError
from orchestrator.serving.backend import ServingBackend
from orchestrator.serving.config import ServiceConfig
from orchestrator.serving.errors import ServingError
from orchestrator.serving.generation import Admission, GeneratedImage, generate, within
from orchestrator.serving.metrics import ServiceMetrics
from orchestrator.serving.request import Generation, ImageRequest, ModelFacts, check_request

log = logging.getLogger(__name__)


class ImageService:
    """Checks, admits and answers requests, and counts them."""

    def __init__(self, backend: ServingBackend, config: ServiceConfig) -> None:
        """Take a backend that is ready."""
        self.backend, self.config, self.metrics = backend, config, ServiceMetrics()
        self.admission = Admission(config.limits, self.metrics)

    async def generate(self, body: ImageRequest, request: Request) -> dict[str, Any]:
        """Return the images of a request in OpenAI's form; raise `ServingError` or `PromptError` for a refused one."""
        start_s, status, name = time.monotonic(), 500, "unknown"
        limits = self.config.limits
        try:
            facts = find_model(self.backend, body.model)
            name = facts.name
            generation = check_request(body, facts, limits)
            if self.config.log_prompts:
                log.info("%s: %r", name, generation.prompt)
            with self.admission.admit(len(generation.seeds)):
                images = await within(generate(self.backend, generation), limits.deadline_s, request)
            status = 200
            self.metrics.images.labels(name).inc(len(images))
            return to_response(images, generation, as_url=body.response_format == "url")
        except ServingError as error:
            status = error.status
            raise
        except PromptError:
            status = 400
            raise
        finally:
            self.metrics.requests.labels(name, status).inc()
            self.metrics.seconds.labels(name).observe(time.monotonic() - start_s)


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
        "adapters": facts.adapters,
        "compressions": facts.compressions,
    }


def to_response(images: list[GeneratedImage], generation: Generation, *, as_url: bool) -> dict[str, Any]:
    """Return images in OpenAI's form, with the seed and the expert of each."""
    data = []
    for image in images:
        text = base64.b64encode(image.file).decode("ascii")
        field = {"url": f"data:image/{generation.output_format};base64,{text}"} if as_url else {"b64_json": text}
        data.append({**field, "seed": image.seed, "expert": image.expert})
    return {"created": int(time.time()), "data": data, "output_format": generation.output_format}
