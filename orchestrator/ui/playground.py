"""The playground: images of a service, `ddm serve`, that the browser reaches through this page alone."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import httpx
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse

from orchestrator.errors import ConfigError
from orchestrator.islands.token import is_confidential, is_loopback, read_token_file
from router.config import SelectionName

PATH = "/playground/images"

MAX_BODY_BYTES = 100_000
"""Of a request; the service has the same limit."""

CONNECT_S, MODELS_S = 5.0, 10.0
"""How long a connection and the list of models may take; an image takes as long as the service allows."""

PASSED_ON = ("content-type", "retry-after")
"""Headers of the service's answer that the browser gets."""

router = APIRouter()


@dataclass(frozen=True, slots=True)
class Service:
    """A service and the key that it needs; the browser never sees the key."""

    address: str
    key: str = field(default="", repr=False)

    @classmethod
    def open(cls, address: str, key_file: Path | None) -> "Service":
        """Check an address and read its key; raise `ConfigError` or `IslandError` with the remedy."""
        url = urlsplit(address)
        if url.scheme not in ("http", "https") or not url.hostname or url.query or url.username:
            raise ConfigError(
                f"--service must be the address of a service, such as http://127.0.0.1:8000; got {address}"
            )
        if key_file is not None and not is_confidential(address):
            raise ConfigError(f"--service {address} would get the key unencrypted; use https, or a tunnel")
        key = "" if key_file is None else read_token_file(key_file.expanduser(), "the API key of the service")
        return cls(address.rstrip("/").removesuffix("/v1"), key)

    def client(self, timeout: httpx.Timeout) -> httpx.AsyncClient:
        """Return a client that sends the key; it follows no redirects, and uses no proxy on this machine."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        trusts = not is_loopback(urlsplit(self.address).hostname or "")
        return httpx.AsyncClient(base_url=self.address, headers=headers, timeout=timeout, trust_env=trusts)

    async def models(self) -> list[dict[str, Any]]:
        """Return what the service says of its models; raise `httpx.HTTPError` or `ValueError` if it does not."""
        async with self.client(httpx.Timeout(MODELS_S)) as client:
            answer = (await client.get("/v1/models")).raise_for_status().json()
        if not isinstance(answer, dict) or not isinstance(answer.get("data"), list):
            raise ValueError("its list of models has another form")
        return list(answer["data"])


@router.get("/playground")
async def show_playground(request: Request) -> HTMLResponse:
    """Show the form for images, with what the models of the service can do."""
    service: Service = request.app.state.service
    models, problem = [], ""
    try:
        models = await service.models()
    except (httpx.HTTPError, ValueError) as error:
        problem = (
            f"{service.address} does not answer ({error or type(error).__name__}). `ddm serve RUN` starts a service."
        )
    facts = {"view": "playground", "models": models, "problem": problem, "selections": get_args(SelectionName)}
    return HTMLResponse(request.app.state.templates.get_template("playground.html").render(**facts))


@router.post(PATH)
async def forward(request: Request) -> Response:
    """Pass a request for images on to the service, and its answer back as it arrives."""
    service: Service = request.app.state.service
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        return PlainTextResponse("the request must be JSON", 415)  # another website cannot send this type
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            return PlainTextResponse(f"the request has more than {MAX_BODY_BYTES:,} bytes", 413)
    client = service.client(httpx.Timeout(CONNECT_S, read=None))
    headers = {"Content-Type": "application/json"}
    try:
        answer = await client.send(
            client.build_request("POST", "/v1/images/generations", content=body, headers=headers), stream=True
        )
    except httpx.HTTPError as error:
        await client.aclose()
        return PlainTextResponse(f"{service.address} does not answer ({error or type(error).__name__})", 502)

    async def parts() -> AsyncIterator[bytes]:
        try:
            async for chunk in answer.aiter_bytes():
                yield chunk
        finally:  # also when the browser has left: the service then drops its work
            await answer.aclose()
            await client.aclose()

    passed_on = {name: answer.headers[name] for name in PASSED_ON if name in answer.headers}
    return StreamingResponse(parts(), answer.status_code, passed_on)
