"""Errors of a request, with their HTTP status, in the form of OpenAI's interface."""

from typing import Any

from orchestrator.errors import OrchestratorError

TYPES = {401: "authentication_error", 429: "rate_limit_error"}
"""OpenAI's types of errors by status; below 500 all others are `invalid_request_error`."""


class ServingError(OrchestratorError):
    """The service refuses a request; the message goes to the client."""

    def __init__(
        self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None, retry_s: int = 0
    ) -> None:
        """Keep the status, the field of the request, a code for programs, and after how many seconds to try again."""
        super().__init__(message)
        self.status, self.param, self.code, self.retry_s = status, param, code, retry_s

    def to_json(self) -> dict[str, Any]:
        """Return the body of the response."""
        return error_body(str(self), self.status, self.param, self.code)

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers of the response."""
        return {"Retry-After": str(self.retry_s)} if self.retry_s else {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the parts to build it from in another process."""
        return _rebuild, (str(self), self.status, self.param, self.code, self.retry_s)


def _rebuild(message: str, status: int, param: str | None, code: str | None, retry_s: int) -> ServingError:
    return ServingError(message, status, param=param, code=code, retry_s=retry_s)


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
