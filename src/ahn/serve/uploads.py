"""Bytes of requests on their way to the disk. When these functions return, the bytes are there."""

from __future__ import annotations

import asyncio
import errno
import os
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from ahn.dialogue import readable
from ahn.errors import OutputError
from ahn.serve.errors import ApiError, of_validation
from ahn.serve.gate import FORM
from ahn.serve.library import Document, Library
from ahn.serve.schema import MemoryBody
from ahn.serve.texts import PLAIN

FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
LONGEST_NAME = 200
BLOCK = 1 << 20


@dataclass
class Upload:
    """The parts of a request for a memory. content: a memory file."""

    name: str = ""
    documents: list[Document] = field(default_factory=list)
    content: Path | None = None

    def discard(self, library: Library) -> None:
        files = [library.uploads / document.file for document in self.documents]
        for file in [*files, *([self.content] if self.content else [])]:
            with suppress(OSError):
                file.unlink()


async def received(http: Request, library: Library, content: bool) -> Upload:
    """Documents in JSON (`text`) or as a form (`text`, `file` again and again, `content`), and a `name`.

    Args:
        content: whether a memory file may come in place of documents.

    Raises:
        ApiError: unknown fields, nothing to read, too many documents. OutputError: the disk is full.
    """
    upload = Upload()
    try:
        if http.headers.get("content-type", "").lower().startswith(FORM):
            await _of_form(http, library, upload, content)
        else:
            body = await _of_json(http)
            upload.name = named(body.name or "")
            upload.documents = [await asyncio.to_thread(_text, library, body.text, upload.name)]
        if not upload.documents and upload.content is None:
            raise ApiError(400, "expected a text or a file", "text", "missing")
        if upload.documents and upload.content is not None:
            raise ApiError(400, "content: expected no text or file beside it", "content", "invalid_value")
    except OSError as error:
        upload.discard(library)
        if isinstance(error, OutputError) or error.errno in FULL:
            raise OutputError("an upload cannot be written: the disk is full") from error
        raise
    except BaseException:
        upload.discard(library)
        raise
    return upload


async def _of_json(http: Request) -> MemoryBody:
    try:
        return MemoryBody.model_validate_json(await http.body())
    except ValidationError as error:
        errors: list[Any] = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        raise of_validation(errors) from None


async def _of_form(http: Request, library: Library, upload: Upload, content: bool) -> None:
    most = library.limits
    async with http.form(max_files=most.documents + 1, max_fields=8, max_part_size=most.body) as form:
        parts = form.multi_items()
        upload.name = named(next((value for key, value in parts if key == "name" and isinstance(value, str)), ""))
        for key, value in parts:
            if isinstance(value, str) and key == "text":
                upload.documents.append(await asyncio.to_thread(_text, library, value, upload.name))
            elif isinstance(value, UploadFile) and key == "file":
                name = named(value.filename or "") or "document"
                file = await asyncio.to_thread(_copy, value.file, library.new_file(name))
                upload.documents.append(Document(name, file.name))
            elif isinstance(value, UploadFile) and key == "content" and content and upload.content is None:
                upload.content = await asyncio.to_thread(_copy, value.file, library.new_file(""))
            elif key != "name" or not isinstance(value, str):
                expected = "name, text and file" + (", or one content" if content else "")
                raise ApiError(400, f"unknown field {key[:80]!r}: expected {expected}", key[:80], "unknown")
        if len(upload.documents) > most.documents:
            raise ApiError(400, f"{len(upload.documents)} documents: expected at most {most.documents}", "file")


async def stored(http: Request, library: Library) -> Path:
    """The body as a file."""
    path = library.new_file("")
    try:
        with path.open("wb") as file:
            async for block in http.stream():
                await asyncio.to_thread(file.write, block)
            await asyncio.to_thread(_settle, file)
    except BaseException as error:
        with suppress(OSError):
            path.unlink()
        if isinstance(error, OSError) and error.errno in FULL:
            raise OutputError("an upload cannot be written: the disk is full") from error
        raise
    return path


def named(text: str) -> str:
    """A name for people: the last part of a path, on one line."""
    name = readable(text).replace("\\", "/").rstrip("/").rpartition("/")[2]
    return "".join(sign for sign in name if unicodedata.category(sign)[0] not in "CZ" or sign == " ")[
        :LONGEST_NAME
    ].strip()


def _text(library: Library, text: str, name: str) -> Document:
    if not text.strip():
        raise ApiError(400, f"text={text[:80]!r}: expected some text", "text", "invalid_value")
    path = library.new_file("").with_suffix(PLAIN)
    _write(path, [readable(text).encode()])
    return Document(name or "text", path.name)


def _copy(source: BinaryIO, path: Path) -> Path:
    _write(path, iter(lambda: source.read(BLOCK), b""))  # type: ignore[arg-type]
    return path


def _write(path: Path, blocks: Sequence[bytes]) -> None:
    try:
        with path.open("wb") as file:
            for block in blocks:
                file.write(block)
            _settle(file)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


def _settle(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
