"""What the handlers of a server share."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahn.config import AHNConfig
from ahn.engine.batch import Engine
from ahn.errors import AHNError, MemoryFileError
from ahn.memory.cache import AHNCache
from ahn.memory.file import SIZES
from ahn.memory.file_format import peek
from ahn.recall.finders.bm25 import Lexicon
from ahn.recall.passages import Passages
from ahn.serve.errors import ApiError
from ahn.serve.kept import Responses
from ahn.serve.library import Entry, Library, identity
from ahn.serve.settings import Limits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "ahn:"  # of the memories among the models


class State:
    """A model that is served, its engine, and the memories of `folder`.

    Args:
        name: of the base among the models. folder: where memories are kept. owners: of memories, each with a folder in
            `folder`; without any, all memories are in `folder` itself.
        recall: tokens to read again where a request does not say, as of `ahn.ask`.
    """

    def __init__(
        self, engine: Engine, name: str, folder: Path, *, owners: list[str], limits: Limits, recall: int | None
    ) -> None:
        self.engine, self.name, self.limits, self.recall = engine, name, limits, recall
        self.created = int(time.time())
        self.libraries = {owner: Library(folder / owner, limits) for owner in owners or [""]}
        self.responses = Responses(limits.kept, engine.bytes_of_slot)
        self.active = 0  # requests that were admitted
        self._loaded: OrderedDict[Path, tuple[Any, AHNCache]] = OrderedDict()
        self._lock = threading.Lock()
        self._loading: dict[Path, threading.Lock] = {}  # so that nobody waits for another memory, or loads one twice

    @property
    def model(self) -> PreTrainedModel:
        return self.engine.model

    @property
    def tokenizer(self) -> Any:
        return self.engine.tokenizer

    # Requests at once.
    def admit(self) -> None:
        """Count a request; `leave` comes after it. Raises ApiError 429 if too many wait, 503 if the engine is dead."""
        if not self.engine.alive:
            raise ApiError(503, "the engine is not running: the server has to be started anew", code="engine")
        most = self.engine.slots + self.limits.waiting
        if self.active >= most:
            raise ApiError(429, f"{self.active:,} requests at once: expected at most {most:,}", code="busy", retry=1)
        self.active += 1

    def leave(self) -> None:
        self.active -= 1

    # Memories.
    def named(self, owner: str, model: str) -> Entry | None:
        """The memory that a request calls a model; None: the base. Raises ApiError: none, or nothing was read yet."""
        if model == self.name:
            return None
        if model.startswith(PREFIX):
            entry = self.libraries[owner].find(model.removeprefix(PREFIX))
            if entry is not None:
                entry.check_there()
                return entry
        raise ApiError(404, f"model {model[:80]!r}: expected one of /v1/models", "model", "model_not_found")

    async def memory(self, entry: Entry) -> AHNCache:
        """A memory that can be asked. Raises MemoryFileError: damaged, or of another model or other sizes."""
        return await asyncio.to_thread(self.load, entry)

    def load(self, entry: Entry) -> AHNCache:
        with self._lock:
            loading = self._loading.setdefault(entry.path, threading.Lock())
        with loading:
            version = identity(entry.path)
            with self._lock:
                known = self._loaded.pop(entry.path, None)
            memory = known[1] if known is not None and known[0] == version else self._from_file(entry)
            with self._lock:
                self._loaded[entry.path] = version, memory
                while len(self._loaded) > self.limits.loaded:
                    self._loaded.popitem(last=False)
        return memory

    def _from_file(self, entry: Entry) -> AHNCache:
        memory = self.checked(entry.path)
        if memory.archive is not None:  # made here, so that nobody waits for it in the engine's thread
            Lexicon.of(Passages.of(memory.archive, self.tokenizer))
        return memory

    def checked(self, path: Path) -> AHNCache:
        """A memory file for this model. Raises MemoryFileError, which names no path."""
        try:
            theirs, ours = AHNConfig.from_dict(peek(path)["config"]), self.model.ahn_config
            for name in SIZES:  # loading would change those of the model, which the engine uses
                kept, served = getattr(theirs, name), getattr(ours, name)
                if kept != served:
                    raise MemoryFileError(f"a memory with {name}={kept:,}: expected {served:,}, as the server has")
            memory = AHNCache.load(path, self.model)
        except AHNError as error:
            raise MemoryFileError(str(error).replace(f"{path}: ", "")) from error
        if memory.batch_size > 1:
            raise MemoryFileError(f"a memory of {memory.batch_size} rows: expected one of one sequence")
        return memory

    def forget(self, entry: Entry) -> None:
        """Do not keep a memory that was deleted."""
        with self._lock:
            self._loaded.pop(entry.path, None)
            self._loading.pop(entry.path, None)
