"""The application of a server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from ahn.errors import AHNError
from ahn.serve import chat, completions, memories, metrics, models, responses
from ahn.serve.errors import ApiError, of_ahn, of_validation
from ahn.serve.gate import Gate
from ahn.serve.keys import Keys
from ahn.serve.reading import Readings
from ahn.serve.state import State
from ahn.version import __version__


def build(state: State, keys: Keys | None = None) -> FastAPI:
    """The application. Its engine has to be started.

    Args:
        keys: API keys; None: everybody who reaches the server may use it.
    """

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        app.state.readings = Readings(state)
        app.state.readings.start()
        yield
        await app.state.readings.stop()

    app = FastAPI(title="ahn", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.state.served = state
    for part in (models, chat, completions, responses, memories, metrics):
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

    @app.exception_handler(Exception)  # it is raised again, so that the log has it
    async def broken(http: Request, error: Exception) -> Any:
        return ApiError(500, "the server has failed: see its log", code="server").response()

    app.add_middleware(Gate, keys=keys, limits=state.limits)
    app.state.registry = metrics.registry_of(state)
    app.add_middleware(metrics.Measured, registry=app.state.registry)
    return app
