"""The batch engine: many conversations and readings on one model, token by token.

One thread owns the model. In turns it decodes one token of every conversation in one batch, and reads a piece of one
prompt or document that takes about `slice_seconds`. So a conversation waits at most that long for a document that is
read meanwhile, and requests come and go between any two tokens.

Everything is in slots of a fixed size (`ahn.engine.slots`). The first ones, without a gap, are the conversations that
are decoding; when one leaves, the last takes its slot. Behind them are a few for reading: what was read there moves to
the front when it begins to answer. A prompt is read but for its last token, which is the first one to be decoded.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ahn.engine.few_rows import weights_first
from ahn.engine.generate import end_tokens
from ahn.engine.jobs import Chat, Job, Load, Pace, Reading
from ahn.engine.prefill import CHUNK, Chunks, Progress, read_chunks
from ahn.engine.sampling import choose
from ahn.engine.sequence import Request, Stream, Text
from ahn.engine.slots import Slots, bytes_of_chunk, bytes_of_weights, eager
from ahn.errors import AHNError, ConfigError, EngineError
from ahn.ids import rows_of
from ahn.memory.cache import AHNCache
from ahn.memory.handle import base_of, handle_of
from ahn.ops import dispatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("ahn")

ALONE_SECONDS = 1.0  # on a CPU, where a short piece takes nearly as long as one of twice its length
T = TypeVar("T")


class Engine:
    """Serves a model to many at once.

        with Engine(model, tokenizer) as engine:
            memory = engine.read(ids).result()
            for event in engine.submit(Request(ids=question, memory=memory)):
                ...

    Args:
        model: from `ahn.augment` or `ahn.from_pretrained`. tokenizer: makes text of answers.
        slots: conversations that decode at once. readers: prompts and documents that are read at once, at least 2; all
            but one of them may be long.
        chunk: tokens that are read at once at most; default 512, on CUDA 2,048, for which no kernel has to be planned.
        slice_seconds: time that a piece of a prompt or document may take between two tokens of the others; a piece has
            at least 32 tokens.
        alone_seconds: the same while nothing is decoded; default 1.0, on CUDA as `slice_seconds`.

    Raises:
        ConfigError: a number out of range, or layers with full attention.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        *,
        slots: int = 8,
        readers: int = 2,
        chunk: int | None = None,
        slice_seconds: float = 0.1,
        alone_seconds: float | None = None,
    ) -> None:
        self.model = base_of(model)
        self.tokenizer, self._readers = tokenizer, readers
        cuda = self.model.device.type == "cuda"
        self.chunk = (dispatch.PLANNED // 2 if cuda else CHUNK) if chunk is None else chunk
        if alone_seconds is None:
            alone_seconds = slice_seconds if cuda else max(slice_seconds, ALONE_SECONDS)
        for name, value, least in (("slots", slots, 1), ("readers", readers, 2), ("chunk", self.chunk, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name}={value!r}: expected an integer of at least {least}")
        for name, seconds in (("slice_seconds", slice_seconds), ("alone_seconds", alone_seconds)):
            if not seconds > 0:
                raise ConfigError(f"{name}={seconds!r}: expected a time above 0")
        self._handle, self._ends = handle_of(self.model), end_tokens(self.model, tokenizer)
        self.bytes_of_slot = Slots.nbytes_of_one(self.model)
        self.slots = slots
        self._slots: Slots | None = None
        self._waiting: deque[Job] = deque()
        self._reading: deque[Job] = deque()
        self._decoding: list[Chat] = []
        self._calls: deque[Callable[[], None]] = deque()
        self._free = list(range(slots, slots + readers))
        self._shared, self._alone = Pace(slice_seconds, self.chunk), Pace(alone_seconds, self.chunk)
        self._generated, self._read = 0, 0
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def bytes_needed(self, slots: int) -> int:
        """Bytes of the weights, of so many slots and those for reading, and of one chunk with the logits of a step."""
        held = bytes_of_weights(self.model) + (slots + self._readers) * self.bytes_of_slot
        return held + bytes_of_chunk(self.model, self.chunk, slots)

    # Its life.
    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def start(self) -> None:
        """Allocate the slots and begin to serve."""
        if self._thread is not None:
            raise EngineError("the engine was started before: expected a new one")
        self.allocate()
        self._thread = threading.Thread(target=self._serve, name="ahn engine", daemon=True)
        self._thread.start()

    def allocate(self) -> None:
        """Make the slots; `start` does."""
        self._slots = Slots(self.model, self.slots, self._readers)

    def close(self) -> None:
        """End after the token or slice in progress; whatever is not done is cancelled."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._closing

    @property
    def load(self) -> Load:
        waiting = len(self._waiting)
        return Load(len(self._decoding), len(self._reading), waiting, self._generated, self._read)

    # What it is asked.
    def submit(self, request: Request) -> Stream:
        """Generate an answer. It waits if there is no free slot.

        Raises:
            ConfigError: ids that do not exist, or a memory of another model or of several sequences.
            EngineError: the engine is closed or has failed.
        """
        ids = self._checked(request.ids, request.memory)
        stream = Stream(self._notify)
        self._add(Chat(request, ids, Text(self.tokenizer, request.stop), stream))
        return stream

    def read(
        self,
        ids: Tensor | Sequence[int],
        memory: AHNCache | None = None,
        *,
        archive: str = "none",
        progress: Progress | None = None,
    ) -> Future[AHNCache]:
        """Read a text of any length behind a copy of `memory`, while conversations go on.

        Args:
            archive: of a new memory, as `AHNCache`; one that is read on keeps its own.
            progress: called in the engine's thread with (tokens read, tokens in all) after each slice; it must return
                soon and raise nothing.

        Returns:
            a future of the memory, on the host; `cancel` ends the reading after the slice in progress.

        Raises:
            ConfigError, EngineError: as `submit`.
        """
        if memory is not None and archive != "none":
            raise ConfigError("{archive} with a memory: it keeps its own", archive=archive)
        empty = AHNCache(self.model, archive) if memory is None else memory
        job = Reading(self._checked(ids, memory), empty, archive, progress)
        self._add(job)
        return job.future

    def run(self, function: Callable[[], T]) -> Future[T]:
        """Call a function that uses the model between two tokens, in the engine's thread; it should be short."""
        future = Future[T]()

        def call() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:  # it is the caller's
                    future.set_exception(error)

        with self._changed:
            self._check_alive()
            self._calls.append(call)
            self._changed.notify()
        return future

    def _checked(self, ids: Any, memory: AHNCache | None) -> Tensor:
        found = rows_of(ids, self._handle.vocabulary)[0]
        if len(found) > 1:
            raise ConfigError(f"ids of {len(found)} rows: expected those of one sequence")
        if memory is not None:
            if memory.batch_size > 1:
                raise ConfigError(f"a memory of {memory.batch_size} rows: expected one of one sequence")
            memory.check_model(self._handle)
        return found.cpu()

    def _add(self, job: Job) -> None:
        with self._changed:
            self._check_alive()
            self._waiting.append(job)
            self._changed.notify()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify()

    def _check_alive(self) -> None:
        if not self.alive:
            reason = "is not running" if self.error is None else f"has failed: {self.error}"
            raise EngineError(f"the engine {reason}")

    # The thread.
    def _serve(self) -> None:
        try:
            with torch.no_grad(), weights_first(self.model):
                self.memories.warm()
                while self._wait():
                    self._turn()
        except BaseException as error:  # everybody who waits has to know
            self.error = error
            logger.exception("the engine has failed")
        finally:
            self._end()

    def _wait(self) -> bool:
        """Wait for work; False at the end."""
        with self._changed:
            while not (self._closing or self._calls or self._waiting or self._reading or self._decoding):
                self._changed.wait()
            return not self._closing

    def _turn(self) -> None:
        while self._calls:
            self._calls.popleft()()
        self._drop_cancelled()
        self._admit()
        if self._decoding:
            self._decode()
        if self._reading:
            self._read_slice()

    def _end(self) -> None:
        with self._changed:
            self._closing = True
            jobs = [*self._decoding, *self._reading, *self._waiting]
            self._calls.clear()
        for job in jobs:
            if self.error is not None:
                job.fail(self.error)
            elif isinstance(job, Chat):
                job.finish("cancelled")
            else:
                job.fail(EngineError("the engine was closed before the text was read"))

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [job for job in (*self._waiting, *self._reading, *self._decoding) if job.cancelled]
            for job in gone:
                if job in self._waiting:
                    self._waiting.remove(job)
        for job in gone:
            if job in self._reading:
                self._reading.remove(job)
                self._free.append(job.slot)
            elif job in self._decoding:
                self._leave(job)
            if isinstance(job, Chat):
                job.finish("cancelled")

    # Reading.
    def _admit(self) -> None:
        """Give slots to those that wait, in their order, but let short prompts pass long texts."""
        with self._changed:
            waiting = [*self._waiting]
        for job in waiting:
            if not self._free:
                break
            if not self._fits(job):
                continue
            with self._changed:
                self._waiting.remove(job)
            job.slot = self._free.pop()
            try:
                job.cache = self.memories.open(job.slot, job.memory, observed=isinstance(job, Reading))
            except AHNError as error:  # its memory is in use, or half-written
                self._free.append(job.slot)
                job.fail(error)
                continue
            self._reading.appendleft(job)

    def _fits(self, job: Job) -> bool:
        if job.is_long and sum(other.is_long for other in self._reading) >= self._readers - 1:
            return False
        ahead = sum(isinstance(other, Chat) for other in self._reading) + len(self._decoding)
        return not isinstance(job, Chat) or ahead < self.slots

    def _read_slice(self) -> None:
        """Read a piece of the text whose turn it is."""
        job = self._reading.popleft()
        try:
            ready = self._read_piece(job)
        except Exception as error:  # of this text alone
            self._free.append(job.slot)
            job.fail(error)
            return
        if not ready:
            self._reading.append(job)
            return
        if isinstance(job, Chat):
            job.position = job.cache.tokens_seen
            self.memories.move(job.cache, len(self._decoding))
            self._decoding.append(job)
        elif isinstance(job, Reading):
            job.finish(self.memories.copy_out(job.cache))
        self._free.append(job.slot)

    def _read_piece(self, job: Job) -> bool:
        """Whether the text is at its end."""
        pace = self._shared if self._decoding else self._alone
        count = min(pace.tokens, job.total - job.done)
        if not count:
            return True
        began = time.perf_counter()
        piece = job.ids[:, job.done : job.done + count].to(self.model.device)
        with eager(self._handle):
            hidden = read_chunks(self._handle.decoder, piece, job.cache, Chunks(count))
        job.done, self._read = job.done + count, self._read + count
        ready = job.done == job.total
        if ready and isinstance(job, Reading):
            job.cache.last_logits = self.model.get_output_embeddings()(hidden)
        if hidden.device.type == "cuda":
            torch.cuda.synchronize(hidden.device)
        pace.note(count, time.perf_counter() - began)
        job.note()
        return ready

    # Decoding.
    @property
    def memories(self) -> Slots:
        assert self._slots is not None
        return self._slots

    def _decode(self) -> None:
        """One token of every conversation."""
        chats = self._decoding
        logits = self.memories.step([chat.next for chat in chats], [chat.position for chat in chats])
        going = [row for row, chat in enumerate(chats) if chat.reason is None]
        requests, generators = [chats[row].request for row in going], [chats[row].generator for row in going]
        wanted = logits if len(going) == len(chats) else logits[going]
        choices = choose(wanted, requests, generators)
        for chat in chats:
            chat.fed.append(chat.next)
            chat.position += 1
        ended = [chat for chat in chats if chat.reason is not None]
        for row, choice in zip(going, choices, strict=True):
            chat = chats[row]
            chat.take(choice, self._ends)
            self._generated += 1
            if chat.reason is not None and not chat.request.keep:
                ended.append(chat)
        for chat in ended:
            assert chat.reason is not None
            memory = None
            if chat.request.keep:
                self.memories.note_read(chat.cache, chat.fed)
                memory = self.memories.copy_out(chat.cache)
            self._leave(chat)
            chat.finish(chat.reason, memory)

    def _leave(self, chat: Any) -> None:
        """Give the slot of a conversation to the last one."""
        row = self._decoding.index(chat)
        last = self._decoding.pop()
        if last is not chat:
            self._decoding[row] = last
            self.memories.move(last.cache, row)
