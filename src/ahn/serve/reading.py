"""Reads the documents that wait into their memories, while questions are answered."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ahn.dialogue import Dialogue
from ahn.errors import AHNError, EngineError, OutputError
from ahn.memory.cache import AHNCache
from ahn.serve.library import Entry, Library, Task
from ahn.serve.state import State
from ahn.serve.texts import Encoded, encoded
from ahn.tokens import digest

logger = logging.getLogger("ahn")

AT_ONCE = 2  # one is prepared while another is read


class Readings:
    """Reads for as long as the server runs. What is not done at its end is done after the next start.

    All methods are called in the event loop.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self._places = asyncio.Semaphore(AT_ONCE)
        self._running: dict[str, asyncio.Task[None]] = {}
        self._digest = digest(state.tokenizer)
        self._kind = "text" if state.model.ahn_retrieval is None else "keys"

    def start(self) -> None:
        """Go on with what the journals say."""
        for library in self.state.libraries.values():
            for entry in library.pending:
                self.begin(library, entry)

    async def stop(self) -> None:
        running = [*self._running.values()]
        for work in running:
            work.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def begin(self, library: Library, entry: Entry) -> None:
        """Read what waits for a memory, unless that is being done."""
        running = self._running.get(entry.id)
        if running is None or running.done():
            self._running[entry.id] = work = asyncio.create_task(self._work(library, entry))
            work.add_done_callback(lambda done: self._ended(entry.id, done))

    def _ended(self, id: str, work: asyncio.Task[None]) -> None:
        if self._running.get(id) is work:  # not one that has begun since
            del self._running[id]

    def cancel(self, entry: Entry) -> None:
        """End the reading into a memory that was deleted."""
        if entry.id in self._running:
            self._running[entry.id].cancel()

    async def _work(self, library: Library, entry: Entry) -> None:
        async with self._places:
            while entry.tasks and not entry.deleted:
                task, reason = entry.tasks[0], None
                try:
                    await self._read(library, entry, task)
                except (EngineError, OutputError) as error:
                    return self._put_off(entry, error)
                except AHNError as error:
                    if isinstance(error.__cause__, OutputError):
                        return self._put_off(entry, error)
                    reason = str(error)
                except Exception:
                    logger.exception("a reading has failed")
                    reason = "the reading has failed: see the log of the server"
                if not entry.deleted:
                    try:
                        await asyncio.to_thread(library.done, entry, task, reason)
                    except OutputError as error:
                        return self._put_off(entry, error)

    def _put_off(self, entry: Entry, error: AHNError) -> None:
        """Nothing is lost: the task is done after the next start, or with the next task of the memory."""
        logger.error("memory %s: %s; what waits is read later", entry.id, error)
        entry.error = "the server could not store it; it is read later"

    async def _read(self, library: Library, entry: Entry, task: Task) -> None:
        state = self.state
        if any(text.get("task") == task.id for text in entry.header().get("texts", [])):
            return  # saved before a crash
        memory = await state.memory(entry) if entry.is_there else None
        texts = [] if memory is None else memory.texts
        before = 0 if memory is None else memory.tokens_seen
        if memory is not None and not texts:
            texts = [{"tokens": before, "sha256": "", "complete": True}]
        documents = [(document.name, library.uploads / document.file) for document in task.documents]
        most = state.limits.tokens - before
        text = await asyncio.to_thread(encoded, Dialogue.of(state.tokenizer), documents, texts, most)
        task.total = len(text.ids)

        def note(done: int, total: int | None) -> None:
            task.done = done

        import torch

        ids = torch.from_numpy(text.ids.astype("int64"))
        kind = self._kind if memory is None else "none"
        read = await asyncio.wrap_future(state.engine.read(ids, memory, archive=kind, progress=note))
        read.texts = [*texts, {"tokens": task.total, "sha256": text.sha256, "complete": True, "task": task.id}]
        await asyncio.to_thread(self._save, entry, read, text, before)

    def _save(self, entry: Entry, memory: AHNCache, text: Encoded, before: int) -> Any:
        if memory.archive is not None:
            memory.archive.tokenizer = self._digest
            text.locate(memory.archive, before)
        with entry.writing:
            if not entry.deleted:
                memory.save(entry.path)
