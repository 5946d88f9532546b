"""Who may see the page, and what a browser may do with it.

Without a token the page answers to loopback names only, so that a website that lets its own name point to 127.0.0.1
reads nothing. With a token every viewer enters it once; the browser then keeps a value derived from it.
"""

import hashlib
import hmac
from collections.abc import Container
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.islands.token import is_loopback

COOKIE = "ddm_ui"

MAX_FORM_BYTES = 4096

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
"""On every answer. Styles may be inline because the charts carry theirs; scripts may not."""

LOGIN = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>ddm ui: token</title><link rel="stylesheet" href="/static/ui.css"><main class="login"><h1>ddm ui</h1>
<form method="post" action="/login"><label for="token">Token</label>
<input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
<button>Open</button></form></main></html>"""


class Guard:
    """ASGI middleware that lets in who may see the page, and adds `HEADERS` to every answer.

    A page may only be read, but for the paths in `forms`.
    """

    def __init__(self, app: ASGIApp, token: str, forms: Container[str] = ()) -> None:
        self.app, self.token, self.forms = app, token, forms
        self.pass_value = hmac.new(token.encode(), b"ddm ui", hashlib.sha256).hexdigest() if token else ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        request = Request(scope, receive)
        refusal = await self._refuse(request)
        await (refusal or self.app)(scope, receive, send_with_headers)

    async def _refuse(self, request: Request) -> Response | None:
        """Return the answer to a request that must not reach the page; None if it may."""
        if not self.token:
            name = request.url.hostname or ""
            if not is_loopback(name):
                return PlainTextResponse(f"{name!r} is not a name of this machine; open http://127.0.0.1", 403)
        elif request.method == "POST" and request.url.path == "/login":
            return await self._log_in(request)
        elif not request.url.path.startswith("/static/") and not self._is_known(request):
            return Response(LOGIN, 401, media_type="text/html")
        if request.method == "POST" and request.url.path in self.forms:
            return None
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("the page only reads", 405, {"Allow": "GET, HEAD"})
        return None

    async def _log_in(self, request: Request) -> Response:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_FORM_BYTES:
                return PlainTextResponse("the form is too large", 413)
        given = parse_qs(body.decode(errors="replace")).get("token", [""])[0].strip()
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            return Response(LOGIN, 401, media_type="text/html")
        answer = RedirectResponse("/", 303)
        is_secure = request.url.scheme == "https"
        answer.set_cookie(COOKIE, self.pass_value, httponly=True, samesite="strict", secure=is_secure)
        return answer

    def _is_known(self, request: Request) -> bool:
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        if hmac.compare_digest(bearer.encode(), self.token.encode()):
            return True
        try:
            cookie = SimpleCookie(request.headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and hmac.compare_digest(cookie.value.encode(), self.pass_value.encode())
