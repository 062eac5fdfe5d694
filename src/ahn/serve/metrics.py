"""GET /metrics, for Prometheus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ahn.serve.state import State

router = APIRouter()

SECONDS = 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300


class Work(Collector):
    """The work of the engine, asked for when it is wanted."""

    def __init__(self, state: State) -> None:
        self.state = state

    def collect(self) -> Iterator[Any]:
        load = self.state.engine.load
        yield GaugeMetricFamily("ahn_engine_alive", "1 while the engine runs", value=self.state.engine.alive)
        yield GaugeMetricFamily("ahn_decoding", "Answers that are decoded", value=load.decoding)
        yield GaugeMetricFamily("ahn_reading", "Prompts and documents that are read", value=load.reading)
        yield GaugeMetricFamily("ahn_waiting", "Prompts and documents that wait", value=load.waiting)
        yield GaugeMetricFamily("ahn_active_requests", "Requests for answers", value=self.state.active)
        yield CounterMetricFamily("ahn_generated_tokens", "Tokens of answers", value=load.tokens_generated)
        yield CounterMetricFamily("ahn_read_tokens", "Tokens of prompts and documents", value=load.tokens_read)


class Measured:
    """Counts requests and times them, by the path of their route.

    Args:
        registry: of the application.
    """

    def __init__(self, app: Any, registry: CollectorRegistry) -> None:
        self.app = app
        self._count = Counter("ahn_requests", "Requests", ["method", "path", "status"], registry=registry)
        self._first = Histogram(
            "ahn_first_byte_seconds", "To the first byte", ["path"], registry=registry, buckets=SECONDS
        )
        self._whole = Histogram("ahn_request_seconds", "To the last byte", ["path"], registry=registry, buckets=SECONDS)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, first = time.monotonic(), 500, None

        async def noted(message: Any) -> None:
            nonlocal status, first
            if message["type"] == "http.response.start":
                status = message["status"]
            elif first is None and message.get("body"):
                first = time.monotonic()
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            path = getattr(scope.get("route"), "path", "other")  # not what the client wrote: there are few routes
            method = scope["method"] if path != "other" else "other"
            self._count.labels(method, path, status).inc()
            self._whole.labels(path).observe(time.monotonic() - began)
            if first is not None:
                self._first.labels(path).observe(first - began)


def registry_of(state: State) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(Work(state))
    return registry


@router.get("/metrics")
async def metrics(http: Request) -> Any:
    text = await asyncio.to_thread(generate_latest, http.app.state.registry)
    return Response(text, media_type=CONTENT_TYPE_LATEST)
