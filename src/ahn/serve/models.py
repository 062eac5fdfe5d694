"""GET /v1/models: the base and every memory that can be asked. GET /health."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from ahn.serve.access import Owner, Served
from ahn.serve.answers import Json
from ahn.serve.library import Entry
from ahn.serve.state import PREFIX, State

router = APIRouter()


@router.get("/v1/models")
async def models(state: Served, owner: Owner) -> Any:
    entries = await asyncio.to_thread(state.libraries[owner].entries)
    return {"object": "list", "data": [_of(state, None), *(_of(state, entry) for entry in entries if entry.is_there)]}


@router.get("/v1/models/{model:path}")
async def model(model: str, state: Served, owner: Owner) -> Any:
    return _of(state, state.named(owner, model))


@router.get("/health")
async def health(state: Served) -> Any:
    """503 if the engine is dead."""
    load = state.engine.load
    body = {"decoding": load.decoding, "reading": load.reading, "waiting": load.waiting}
    if not state.engine.alive:
        return JSONResponse({"status": "dead"} | body, 503)
    return {"status": "ok"} | body


def _of(state: State, entry: Entry | None) -> Json:
    id, name = (state.name, state.name) if entry is None else (f"{PREFIX}{entry.id}", entry.name)
    created = state.created if entry is None else entry.created
    return {"id": id, "object": "model", "created": created, "owned_by": "ahn", "name": name}
