"""/v1/memories: made from text and documents, listed, appended to, taken out and in as files, deleted."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Depends, Header, Request
from fastapi.responses import JSONResponse, StreamingResponse

from ahn.errors import OutputError
from ahn.memory.file_contents import check
from ahn.serve.access import Reader, Served, owner_of, state_of
from ahn.serve.answers import Json
from ahn.serve.library import Entry, Library
from ahn.serve.schema import ForkBody
from ahn.serve.state import State
from ahn.serve.uploads import BLOCK, named, received, stored

router = APIRouter(prefix="/v1/memories")

ACCEPTED = 202
LONGEST_KEY = 255


def library_of(http: Request) -> Library:
    return state_of(http).libraries[owner_of(http)]


Mine = Annotated[Library, Depends(library_of)]
Key = Annotated[str | None, Header(alias="Idempotency-Key", max_length=LONGEST_KEY)]


@router.post("", status_code=ACCEPTED)
async def create(http: Request, state: Served, library: Mine, readings: Reader, key: Key = None) -> Any:
    """A new memory: of a text or documents, which are read from now on, or of a memory file."""
    await asyncio.to_thread(library.check_room, True)
    upload = await received(http, library, content=True)
    if upload.content is not None:
        entry = await _put(state, library, upload.content, None, upload.name)
        return JSONResponse(shown(entry), 201)
    try:
        entry = await asyncio.to_thread(library.read, upload.documents, None, upload.name, key)
    except BaseException:
        upload.discard(library)
        raise
    readings.begin(library, entry)
    return shown(entry)


@router.get("")
async def listed(library: Mine) -> Any:
    entries = await asyncio.to_thread(library.entries)
    return {"object": "list", "data": await asyncio.to_thread(lambda: [shown(entry) for entry in entries])}


@router.get("/{id}")
async def get(id: str, library: Mine) -> Any:
    return shown(library.get(id))


@router.delete("/{id}")
async def delete(id: str, state: Served, library: Mine, readings: Reader) -> Any:
    """What is being answered about it goes on to its end."""
    entry = library.get(id)
    await asyncio.to_thread(library.delete, entry)
    readings.cancel(entry)
    await asyncio.to_thread(state.forget, entry)
    return {"id": entry.id, "object": "memory.deleted", "deleted": True}


@router.post("/{id}/append", status_code=ACCEPTED)
async def append(id: str, http: Request, library: Mine, readings: Reader, key: Key = None) -> Any:
    """Read more behind what the memory holds; meanwhile it is asked as it is. A key makes repeating it harmless."""
    entry = library.get(id)
    upload = await received(http, library, content=False)
    try:
        entry = await asyncio.to_thread(library.read, upload.documents, entry, "", key)
    except BaseException:
        upload.discard(library)
        raise
    readings.begin(library, entry)
    return shown(entry)


@router.post("/{id}/fork", status_code=201)
async def fork(id: str, body: ForkBody, state: Served, library: Mine) -> Any:
    """A new memory like this one."""
    entry = library.there(id)
    path = library.new_file("")

    def copied() -> None:
        try:
            with entry.writing:
                shutil.copyfile(entry.path, path)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise OutputError(f"a memory cannot be copied: {error.strerror}") from error

    await asyncio.to_thread(copied)
    return shown(await _put(state, library, path, None, named(body.name or entry.name)))


@router.get("/{id}/content")
async def content(id: str, library: Mine) -> Any:
    """The memory file."""
    entry = library.there(id)
    file, size = await asyncio.to_thread(_opened, entry)
    headers = {"Content-Length": str(size), "Content-Disposition": f'attachment; filename="{entry.id}.ahn"'}
    return StreamingResponse(_blocks(file, size), media_type="application/octet-stream", headers=headers)


@router.put("/{id}/content")
async def replace(id: str, http: Request, state: Served, library: Mine) -> Any:
    """A memory file in place of the one that is there."""
    entry = library.get(id)
    return shown(await _put(state, library, await stored(http, library), entry, ""))


async def _put(state: State, library: Library, path: Path, into: Entry | None, name: str) -> Entry:
    """Check a memory file, and take it in."""

    def put() -> Entry:
        try:
            state.checked(path)
            check(path)
            return library.put(path, into, name)
        finally:
            path.unlink(missing_ok=True)

    return await asyncio.to_thread(put)


def _opened(entry: Entry) -> tuple[BinaryIO, int]:
    """The file of a memory, and its size while nothing is being appended to it."""
    with entry.writing:
        file = entry.path.open("rb")
        return file, os.fstat(file.fileno()).st_size


def _blocks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The first `size` bytes: more may be appended meanwhile."""
    with file:
        while size and (block := file.read(min(size, BLOCK))):
            size -= len(block)
            yield block


def shown(entry: Entry) -> Json:
    """A memory as clients see it."""
    header, reading = entry.header(), entry.tasks[0] if entry.tasks else None
    archive = header.get("archive") or {}
    return {
        "id": entry.id,
        "object": "memory",
        "name": entry.name,
        "created": entry.created,
        "status": entry.status,
        "model": f"ahn:{entry.id}",
        "tokens": header.get("tokens_seen", 0),
        "bytes": entry.path.stat().st_size if header else 0,
        "documents": archive.get("documents", []),
        "waiting": len(entry.tasks),
        "progress": None if reading is None else {"done": reading.done, "total": reading.total},
        "error": entry.error,
    }
