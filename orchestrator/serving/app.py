"""The HTTP interface: OpenAI's images form, models, health, metrics and the OpenAPI page."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ddm_core.errors import DDMError
from ensemble.sampling.prompts import PromptError
from orchestrator.serving.backend import ServingBackend
from orchestrator.serving.config import ServiceConfig
from orchestrator.serving.errors import ServingError, error_body
from orchestrator.serving.keys import ApiKeys
from orchestrator.serving.request import ImageRequest
from orchestrator.serving.service import ImageService, describe_model, find_model

log = logging.getLogger(__name__)

LOOPBACK_NAMES = ["localhost", "127.0.0.1", "[::1]", "testserver"]
"""Hosts that a request to a loopback address may name: a page of another host in a browser may not."""


def create_app(backend: ServingBackend, config: ServiceConfig, keys: ApiKeys) -> FastAPI:
    """Build the application of a service."""
    app = FastAPI(title="ddm serve", description="Sample ensembles of diffusion experts", version="1")
    service = ImageService(backend, config)
    _handle_errors(app)
    app.add_middleware(BodyLimit, max_bytes=config.limits.body_bytes)
    if config.is_loopback:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK_NAMES)

    async def authorize(request: Request) -> None:
        if not keys.accept(request.headers.get("authorization", "")):
            raise ServingError("this service needs an API key: Authorization: Bearer KEY", 401, code="invalid_api_key")

    secured = [Depends(authorize)]

    @app.post("/v1/images/generations", dependencies=secured)
    async def generate_images(body: ImageRequest, request: Request) -> Response:
        """Sample images; the fields after `user` are not OpenAI's."""
        return await service.generate(body, request)

    @app.get("/v1/models", dependencies=secured)
    async def list_models() -> dict[str, Any]:
        """List the models, with what requests may want of each."""
        return {"object": "list", "data": [describe_model(facts) for facts in backend.facts.values()]}

    @app.get("/v1/models/{name}", dependencies=secured)
    async def show_model(name: str) -> dict[str, Any]:
        """Show one model."""
        return describe_model(find_model(backend, name))

    @app.get("/metrics", dependencies=secured)
    async def show_metrics() -> Response:
        """Return counters and times for Prometheus."""
        return Response(service.metrics.to_text(), media_type="text/plain; version=0.0.4")

    @app.get("/healthz")
    async def check_health() -> dict[str, Any]:
        """Return that the service lives, and accepts requests: it starts to listen when its models are loaded."""
        return {"live": True, "ready": True, "images_in_flight": service.admission.in_flight}

    return app


class BodyLimit:
    """Refuses bodies that are too large, before they are in memory."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        """Wrap an application."""
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on the parts of a body up to the limit; raise `HTTPException` 413 beyond."""
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_bytes:
                raise HTTPException(413, f"the body of a request has at most {self.max_bytes} bytes here")
            return message

        await self.app(scope, limited, send)


def _handle_errors(app: FastAPI) -> None:
    """Answer every error in OpenAI's form."""

    def answer(status: int, message: str) -> Response:
        return JSONResponse(error_body(message, status), status)

    async def on_serving_error(_request: Request, error: Any) -> Response:
        return JSONResponse(error.to_json(), error.status, headers=error.headers)

    async def on_invalid(_request: Request, error: Any) -> Response:
        first = error.errors()[0]
        names = [str(part) for part in first["loc"] if part != "body"]
        reason = f"{'.'.join(names)}: {first['msg']}" if names else str(first["msg"])
        if first["type"] == "extra_forbidden":
            reason = f"there is no field {names[-1][:40]!r}; known: {', '.join(ImageRequest.model_fields)}"
        return JSONResponse(error_body(reason, 400, names[0] if names else None), 400)

    async def on_http(_request: Request, error: Any) -> Response:
        return JSONResponse(error_body(str(error.detail), error.status_code), error.status_code, headers=error.headers)

    async def on_prompt_error(_request: Request, error: Any) -> Response:
        return answer(400, str(error))

    async def on_our_error(_request: Request, error: Any) -> Response:
        log.error("%s", error)
        return answer(500, str(error))

    handlers: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {
        ServingError: on_serving_error,
        RequestValidationError: on_invalid,
        HTTPException: on_http,
        PromptError: on_prompt_error,
        DDMError: on_our_error,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
