"""What a batch engine has to do: texts that are read into slots, some of which are then answered."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ahn.engine.sampling import Choice, generator_of
from ahn.engine.sequence import Finish, Request, Stream, Text, Token, Usage
from ahn.memory.cache import AHNCache

if TYPE_CHECKING:
    from ahn.engine.prefill import Progress

LONG = 1024  # tokens from which on a prompt is read as a document is: it leaves a slot for shorter ones
LEAST = 32  # tokens that are read at once, if there are so many


class Pace:
    """How many tokens to read at once: a power of two times LEAST, so that it takes `seconds` at most.

    Args:
        most: tokens at most.
    """

    def __init__(self, seconds: float, most: int) -> None:
        self.seconds, self.least, self.most = seconds, min(LEAST, most), most
        self.tokens = self.least

    def note(self, count: int, seconds: float) -> None:
        """The time that so many tokens took. Fewer than there could be say little."""
        if count < self.tokens:
            return
        if seconds > self.seconds:
            self.tokens = max(self.least, self.tokens // 2)
        elif seconds < self.seconds / 2:
            self.tokens = min(self.most, self.tokens * 2)


class Job:
    """A text to be read into a slot.

    Args:
        ids: int64 [1, T]. memory: it follows. whole: read all of it; else its last token is left to be decoded.
    """

    cache: AHNCache
    slot: int

    def __init__(self, ids: Tensor, memory: AHNCache | None, whole: bool) -> None:
        self.ids, self.memory, self.done = ids, memory, 0
        self.total = ids.shape[1] - (not whole)

    @property
    def is_long(self) -> bool:
        return self.total > LONG

    @property
    def cancelled(self) -> bool:
        raise NotImplementedError

    def fail(self, error: BaseException) -> None:
        raise NotImplementedError

    def note(self) -> None:
        """Called after each slice."""


class Reading(Job):
    """A document, of which nothing is asked yet."""

    def __init__(self, ids: Tensor, memory: AHNCache | None, archive: str, progress: Progress | None) -> None:
        super().__init__(ids, memory, whole=True)
        self.archive, self.progress, self.future = archive, progress, Future[AHNCache]()

    @property
    def is_long(self) -> bool:
        return True

    @property
    def cancelled(self) -> bool:
        return self.future.cancelled()

    def fail(self, error: BaseException) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def finish(self, memory: AHNCache) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(memory)

    def note(self) -> None:
        if self.progress is not None:
            self.progress(self.done, self.total)


class Chat(Job):
    """A request, its prompt first, then its answer."""

    def __init__(self, request: Request, ids: Tensor, text: Text, stream: Stream) -> None:
        super().__init__(ids, request.memory, whole=False)
        self.request, self.text, self.stream = request, text, stream
        self.generator = generator_of(request)
        self.next, self.count = int(ids[0, -1]), 0  # token to be decoded next; generated ones
        self.position = 0  # of `next`
        self.fed: list[int] = []  # tokens decoded so far
        self.reason: str | None = None  # for the end; then only `next` is still read

    @property
    def cancelled(self) -> bool:
        return self.stream.cancelled

    def fail(self, error: BaseException) -> None:
        self.finish("error", error=error)

    def finish(self, reason: str, memory: AHNCache | None = None, error: BaseException | None = None) -> None:
        cached = 0 if self.memory is None else self.memory.tokens_seen
        usage = Usage(cached + self.ids.shape[1], cached, self.count)
        self.stream.put(Finish(reason, usage, memory, error))

    def take(self, choice: Choice, ends: set[int]) -> None:
        """The token that follows."""
        self.next, self.count = choice.id, self.count + 1
        ended = self.request.ends and choice.id in ends
        text = self.text.rest() if ended else self.text.add(choice.id)
        if ended or self.text.stopped:
            self.reason = "stop"
        elif self.count == self.request.max_new_tokens:
            self.reason, text = "length", text + self.text.rest()
        self.stream.put(Token(choice.id, text, choice.logprob, choice.top))


@dataclass(frozen=True)
class Load:
    """The work of an engine: conversations that decode, prompts and documents that are read, others that wait, and
    tokens since it started."""

    decoding: int
    reading: int
    waiting: int
    tokens_generated: int
    tokens_read: int
