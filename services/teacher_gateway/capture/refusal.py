"""Errors as OpenAI writes them, so that its SDK raises its own exceptions."""

from __future__ import annotations

from typing import Any

import msgspec

from services.teacher_gateway.problems import RETRY_SECONDS, ProblemError

# What the SDK calls them decides how callers handle them; see openai.types.ErrorObject.
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "invalid_request_error",
    429: "rate_limit_error",
}
# What is left of these requests is not waited for.
_CLOSING = frozenset({408, 413})
Headers = list[tuple[bytes, bytes]]


class Refusal(Exception):
    """Answer a request with an error. `code` is for programs, the text says what to do."""

    def __init__(
        self, status: int, code: str, detail: str, *, retry_after: float | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> bytes:
        return error_body(self.status, self.code, str(self))

    @property
    def headers(self) -> Headers:
        found: Headers = [(b"content-type", b"application/json")]
        if self.retry_after is not None:
            found.append((b"retry-after", f"{self.retry_after:g}".encode()))
        if self.status in _CLOSING:
            found.append((b"connection", b"close"))
        if self.status == 401:
            found.append((b"www-authenticate", b"Bearer"))
        return found


def error_body(status: int, code: str, detail: str) -> bytes:
    """The JSON of an error; also what is sent inside of a stream that breaks off."""
    default = "server_error" if status >= 500 else "invalid_request_error"
    error: dict[str, Any] = {
        "message": detail,
        "type": _TYPES.get(status, default),
        "param": None,
        "code": code,
    }
    return msgspec.json.encode({"error": error})


def from_problem(error: ProblemError) -> Refusal:
    """The same refusal in OpenAI's form."""
    found = error.headers.get("Retry-After")
    return Refusal(
        error.problem.status,
        error.problem.type.rpartition(":")[2].replace("-", "_"),
        error.problem.detail,
        retry_after=None if found is None else float(found),
    )


def unavailable(what: str) -> Refusal:
    return Refusal(
        503,
        "unavailable",
        f"{what}; try again in a few seconds",
        retry_after=RETRY_SECONDS,
    )
