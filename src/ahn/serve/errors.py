"""Errors as OpenAI clients expect them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi.responses import JSONResponse

from ahn.dialogue import readable
from ahn.errors import AHNError, ConfigError, DocumentError, MemoryFileError, OutputError

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
FULL_DISK = 507


class ApiError(Exception):
    """An answer with a status of 400 or more.

    Args:
        status: of HTTP. message: names the value that is wrong and those that are allowed. param: the field of the
            request. code: for programs. retry: seconds after which to try again.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry = status, param, code, retry

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": readable(str(self)), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        headers = {} if self.retry is None else {"Retry-After": str(self.retry)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def of_ahn(error: AHNError) -> ApiError:
    """An error of this package as one of HTTP."""
    if isinstance(error, OutputError) or isinstance(error.__cause__, OutputError):
        return ApiError(FULL_DISK, "the disk of the server refused: full, or not writable", code="storage")
    if isinstance(error, ConfigError | DocumentError | MemoryFileError):
        return ApiError(400, str(error), next(iter(error.settings), None), "invalid_value")
    return ApiError(503, str(error), code="engine")


def of_validation(errors: Sequence[Any]) -> ApiError:
    """The errors of pydantic as one, unknown fields first."""
    unknown = [_field(error) for error in errors if error["type"] == "extra_forbidden"]
    if unknown:
        named = ", ".join(repr(name) for name in unknown[:3])
        return ApiError(400, f"unknown field {named}: expected only those of the documentation", unknown[0], "unknown")
    error = errors[0]
    field = _field(error)
    if error["type"] == "json_invalid" or (error["type"] == "missing" and not field):
        return ApiError(400, "body: expected JSON, with Content-Type: application/json", code="invalid_json")
    code = "missing" if error["type"] == "missing" else "invalid_value"
    found = "" if code == "missing" else f"={str(error['input'])[:80]!r}"
    return ApiError(400, f"{field or 'body'}{found}: {error['msg']}", field or None, code)


def _field(error: Any) -> str:
    """The place of an error in the body, without the names of alternatives."""
    return ".".join(str(part) for part in error["loc"][1:] if str(part).isidentifier() or str(part).isdigit())
