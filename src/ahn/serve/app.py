"""The application of a server."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException as FastAPIHTTPException
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from ahn.errors import AHNError
from ahn.serve import chat, completions, models
from ahn.serve.errors import ApiError, of_ahn, of_validation
from ahn.serve.state import State
from ahn.version import __version__


def build(state: State, keys: Any = None) -> FastAPI:
    """The application. Its engine has to be started.

    Args:
        keys: API keys; None: everybody who reaches the server may use it.
    """
    app = FastAPI(title="ahn", version=__version__, docs_url=None, redoc_url=None)
    app.state.served, app.state.keys = state, keys
    for part in (models, chat, completions):
        app.include_router(part.router)

    @app.exception_handler(ApiError)
    async def refused(http: Request, error: ApiError) -> Any:
        return error.response()

    @app.exception_handler(AHNError)
    async def failed(http: Request, error: AHNError) -> Any:
        return of_ahn(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(http: Request, error: RequestValidationError) -> Any:
        return of_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def other(http: Request, error: HTTPException) -> Any:
        return ApiError(error.status_code, f"{http.method} {http.url.path}: {error.detail}").response()

    app.add_middleware(Bounded, body=state.limits.body, upload=state.limits.upload)
    return app


class Bounded:
    """Refuses bodies that are too large, as soon as that is known."""

    def __init__(self, app: Any, body: int, upload: int) -> None:
        self.app, self.body, self.upload = app, body, upload

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        kind = headers.get(b"content-type", b"")
        most = self.body if kind.startswith(b"application/json") else self.upload
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > most:
            await ApiError(413, _too_large(most), code="too_large").response()(scope, receive, send)
            return
        seen = 0

        async def bounded() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise FastAPIHTTPException(413, _too_large(most))
            return message

        await self.app(scope, bounded, send)


def _too_large(most: int) -> str:
    return f"body: expected at most {most:,} bytes"
