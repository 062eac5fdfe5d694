"""Memories on disk: one folder for each owner, with memory files, the documents that wait to be read, and a journal.

What the journal says is true after a crash: a document is acknowledged once its bytes and then its line are on disk. A
memory file that somebody put into the folder is a memory too, under its own name.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ahn.errors import MemoryFileError, OutputError
from ahn.files import to_disk
from ahn.memory.file_format import peek
from ahn.serve.errors import ApiError
from ahn.serve.journal import Journal, Line
from ahn.serve.settings import Limits

ENDING = ".ahn"
UPLOADS = ".uploads"
KEPT_LINES = 1000  # of the journal; with more it is shortened at the next start
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,126}")
_SUFFIXES = re.compile(r"(?:\.[A-Za-z0-9]{1,8}){0,2}$")


@dataclass(frozen=True)
class Document:
    """An uploaded document: its name for people, and its file in the folder of uploads."""

    name: str
    file: str


@dataclass
class Task:
    """Documents that are to be read into a memory. done, total: tokens, once they are known."""

    id: str
    documents: list[Document]
    key: str | None = None
    done: int = 0
    total: int | None = None


@dataclass
class Entry:
    """A memory.

    Attributes:
        tasks: not done yet, in order. keys: of idempotent requests. error: of the last task. writing: held while its
            file changes.
    """

    id: str
    path: Path
    name: str
    created: int
    tasks: list[Task] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    error: str | None = None
    deleted: bool = False
    writing: threading.Lock = field(default_factory=threading.Lock)
    _known: tuple[list[int] | None, dict[str, Any]] = (None, {})

    @property
    def is_there(self) -> bool:
        """Whether it can be asked."""
        return self.path.is_file()

    def check_there(self) -> None:
        """Raises ApiError 409 if it cannot be asked."""
        if not self.is_there:
            raise ApiError(
                409, f"memory {self.id!r}: is {self.status}; expected one that has read something", code="empty"
            )

    @property
    def status(self) -> str:
        if self.tasks:
            return "queued" if self.tasks[0].total is None else "reading"
        return "ready" if self.is_there and not self.error else "failed"

    def header(self) -> dict[str, Any]:
        """Of its file; empty where there is none, or none that can be read."""
        try:
            version = identity(self.path)
            if version is not None and self._known[0] != version:
                self._known = version, peek(self.path)
        except MemoryFileError:
            return {}
        return {} if version is None else self._known[1]


class Library:
    """The memories of one owner. Its methods write to disk, and may be called from any thread.

    Raises:
        OutputError: the folder cannot be made. MemoryFileError: its journal is damaged.
    """

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder, self.limits = folder, limits
        self.uploads = folder / UPLOADS
        try:
            self.uploads.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made: {error.strerror}") from error
        self._lock = threading.RLock()
        self._entries: dict[str, Entry] = {}
        self._created: dict[str, Entry] = {}  # by the key of the request that made it
        self._journal = Journal(folder / "journal.jsonl")
        for line in self._journal.lines:
            self._apply(line)
        self._tidy()
        if len(self._journal.lines) > KEPT_LINES + 2 * len(self._entries):
            self._journal.rewrite(self._summary())

    # What it holds.
    def entries(self) -> list[Entry]:
        """All memories, oldest first."""
        with self._lock:
            for path in self.folder.glob(f"*{ENDING}"):
                self._found(path.name.removesuffix(ENDING))
            return sorted(self._entries.values(), key=lambda entry: (entry.created, entry.id))

    def get(self, id: str) -> Entry:
        """Raises ApiError 404 if there is none."""
        entry = self.find(id)
        if entry is None:
            raise ApiError(404, f"memory {id[:80]!r}: there is none", "memory", "memory_not_found")
        return entry

    def there(self, id: str) -> Entry:
        """A memory that can be asked. Raises ApiError 404, 409."""
        entry = self.get(id)
        entry.check_there()
        return entry

    def find(self, id: str) -> Entry | None:
        with self._lock:
            return self._found(id)

    def _found(self, id: str) -> Entry | None:
        """A memory by name, also one whose file somebody put there."""
        if id not in self._entries and _ID.fullmatch(id):
            path = self.folder / f"{id}{ENDING}"
            if path.is_file():
                self._entries[id] = Entry(id, path, id, int(path.stat().st_mtime))
        return self._entries.get(id)

    @property
    def pending(self) -> list[Entry]:
        """Memories with something to be read."""
        with self._lock:
            return [entry for entry in self._entries.values() if entry.tasks]

    # Its changes. Each is done once its line is on disk.
    def new_file(self, name: str) -> Path:
        """Where an upload is written to, with the ending of a document called `name`."""
        match = _SUFFIXES.search(name)
        return self.uploads / (secrets.token_hex(16) + (match[0].lower() if match else ""))

    def read(self, documents: Sequence[Document], into: Entry | None, name: str = "", key: str | None = None) -> Entry:
        """Acknowledge documents whose bytes are on disk: of a new memory, or of one to append to.

        Args:
            key: a second call with it changes nothing.

        Raises:
            ApiError: too many memories or tasks. OutputError.
        """
        with self._lock:
            if (known := self._by_key(key, into)) is not None:
                self._discard(documents)
                return known
            self._check_kept(into)
            self.check_room(new=into is None)
            to_disk(self.uploads)
            task = secrets.token_hex(8)
            files = _files(documents)
            id = into.id if into is not None else self._new_id()
            line = {"do": "read", "memory": id, "task": task, "documents": files, "key": key, "new": into is None}
            self._write(line | self._about(id, name))
            return self._entries[id]

    def put(self, file: Path, into: Entry | None, name: str = "") -> Entry:
        """Acknowledge a memory file that was uploaded, in place of another one or as a new memory."""
        with nullcontext() if into is None else into.writing, self._lock:
            self._check_kept(into)
            if into is None:
                self.check_room(new=True)
            elif into.tasks:
                raise ApiError(409, f"memory {into.id!r}: is being read; expected one at rest", "memory", "busy")
            id = into.id if into is not None else self._new_id()
            try:
                to_disk(file)
                file.replace(self.folder / f"{id}{ENDING}")
                to_disk(self.folder)
            except OSError as error:
                raise OutputError(f"{id}: cannot be written: {error}") from error
            self._write({"do": "put", "memory": id} | self._about(id, name))
            return self._entries[id]

    def done(self, entry: Entry, task: Task, error: str | None = None) -> None:
        """The end of a task."""
        with self._lock:
            self._write({"do": "done", "memory": entry.id, "task": task.id, "error": error})
            self._discard(task.documents)

    def delete(self, entry: Entry) -> None:
        with self._lock:
            if entry.deleted:
                return
            documents = [document for task in entry.tasks for document in task.documents]
            self._write({"do": "delete", "memory": entry.id, "file": identity(entry.path)})
            self._discard(documents)
        with entry.writing, suppress(FileNotFoundError):
            entry.path.unlink()

    def check_room(self, new: bool) -> None:
        """Raises ApiError if there may be no further memory, or nothing further to read."""
        if new and len(self.entries()) >= self.limits.memories:
            raise ApiError(429, f"{self.limits.memories:,} memories: expected at most so many", code="memories")
        waiting = sum(len(entry.tasks) for entry in self._entries.values())
        if waiting >= self.limits.readings:
            raise ApiError(429, f"{waiting:,} texts wait to be read: expected fewer", code="readings", retry=30)

    def _by_key(self, key: str | None, into: Entry | None) -> Entry | None:
        """The memory that an earlier request with this key made or appended to."""
        if key is None:
            return None
        if into is None:
            return self._created.get(key)
        return into if key in into.keys else None

    def _check_kept(self, entry: Entry | None) -> None:
        """Raises ApiError 404 if a memory was deleted meanwhile."""
        if entry is not None and entry.deleted:
            raise ApiError(404, f"memory {entry.id!r}: was deleted", "memory", "memory_not_found")

    # The journal.
    def _new_id(self) -> str:
        return f"mem_{secrets.token_hex(16)}"

    def _about(self, id: str, name: str) -> Line:
        known = self._entries.get(id)
        if known is not None:
            return {"name": known.name, "created": known.created}
        return {"name": name or id, "created": int(time.time())}

    def _write(self, line: Line) -> None:
        self._journal.add(line)
        self._apply(line)

    def _apply(self, line: Line) -> None:
        id = line["memory"]
        if line["do"] in ("read", "put", "keep"):
            path = self.folder / f"{id}{ENDING}"
            entry = self._entries.setdefault(id, Entry(id, path, line["name"], line["created"]))
            entry.error = None
            if line["do"] == "read":
                documents = [Document(**document) for document in line["documents"]]
                entry.tasks.append(Task(line["task"], documents, line["key"]))
                if line["key"] is not None and line["new"]:
                    self._created[line["key"]] = entry
                elif line["key"] is not None:
                    entry.keys.add(line["key"])
            elif line["do"] == "keep":
                entry.error, entry.keys = line["error"], set(line["keys"])
                if line["made"] is not None:
                    self._created[line["made"]] = entry
        elif line["do"] == "done" and id in self._entries:
            entry = self._entries[id]
            entry.tasks = [task for task in entry.tasks if task.id != line["task"]]
            entry.error = line["error"]
        elif line["do"] == "delete" and id in self._entries:
            entry = self._entries.pop(id)
            entry.deleted, entry.tasks = True, []
            self._created = {key: made for key, made in self._created.items() if made is not entry}

    def _summary(self) -> list[Line]:
        """Lines that say the same as all so far."""
        lines: list[Line] = []
        made = {entry.id: key for key, entry in self._created.items()}
        for entry in self._entries.values():
            about = {"memory": entry.id, "name": entry.name, "created": entry.created}
            keys = sorted(entry.keys)
            lines.append({"do": "keep", "keys": keys, "made": made.get(entry.id), "error": entry.error, **about})
            for task in entry.tasks:
                files = [{"name": document.name, "file": document.file} for document in task.documents]
                lines.append(
                    {"do": "read", "task": task.id, "documents": files, "key": task.key, "new": False, **about}
                )
        return lines

    def _tidy(self) -> None:
        """Remove what a crash has left: files of deleted memories, and uploads that were not acknowledged."""
        for line in self._journal.lines:
            path = self.folder / f"{line['memory']}{ENDING}"
            if line["do"] == "delete" and line["file"] and identity(path) == line["file"]:
                path.unlink()
        kept = {document.file for entry in self.pending for task in entry.tasks for document in task.documents}
        for file in self.uploads.iterdir():
            if file.name not in kept:
                file.unlink()

    def _discard(self, documents: Sequence[Document]) -> None:
        for document in documents:
            with suppress(OSError):
                os.unlink(self.uploads / document.file)


def _files(documents: Sequence[Document]) -> list[Line]:
    return [{"name": document.name, "file": document.file} for document in documents]


def identity(path: Path) -> list[int] | None:
    """Tells a file from another one that is put in its place; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_ino, status.st_size, status.st_mtime_ns]
