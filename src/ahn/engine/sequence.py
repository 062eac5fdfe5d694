"""Requests to a batch engine, and the answers that come back token by token."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ahn.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ahn.memory.cache import AHNCache

logger = logging.getLogger("ahn")

MOST_ALTERNATIVES = 20
MOST_SEED = 1 << 63
HELD = 16  # tokens that wait at most for the rest of a character


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate, and after what.

    Args:
        ids: new token ids [T] or [1, T], at least one.
        memory: what they follow, for one sequence; it is not changed. None: nothing.
        max_new_tokens: at least 1.
        temperature: 0 takes the likeliest token. top_p: the likeliest tokens with this share together are drawn from.
        seed: of the draws, which depend on nothing else; None: a new one.
        stop: texts that end the answer, of which they are no part.
        logprobs: give the logarithm of each token's probability (before temperature and top_p), and those of so many
            likeliest tokens. None: not.
        ends: whether the tokens that end an answer of the model do so.
        keep: give the memory back as it is after the answer (`Finish.memory`).

    Raises:
        ConfigError: a value out of range.
    """

    ids: Tensor | Sequence[int]
    memory: AHNCache | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = None
    ends: bool = True
    keep: bool = False

    def __post_init__(self) -> None:
        _check_integer("max_new_tokens", self.max_new_tokens, 1)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, MOST_SEED - 1)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MOST_ALTERNATIVES)
        if not _is_number(self.temperature) or not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature!r}: expected a number of at least 0")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p!r}: expected a number above 0, at most 1")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError(f"stop={self.stop!r}: expected texts of at least one character")


@dataclass(frozen=True)
class Token:
    """A generated token.

    Attributes:
        text: of this token and earlier ones, as far as it is certain; may be empty. logprob: if it was asked for.
        top: the likeliest tokens and their logprobs.
    """

    id: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens: of the prompt in all, of those the ones that were in the memory already, and generated ones."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Finish:
    """The end of an answer.

    Attributes:
        reason: "stop", "length", "cancelled" or "error".
        memory: with `Request.keep`, on the host, if the reason is "stop" or "length": it has read all tokens of the
            request and of the answer, the last one too, and has no archive.
        error: with the reason "error".
    """

    reason: str
    usage: Usage
    memory: AHNCache | None = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Result:
    """A whole answer."""

    ids: list[int]
    text: str
    finish: Finish


Event = Token | Finish


class Stream:
    """The answer to a request: tokens as they come, then one `Finish`. For one reader, in any thread or event loop."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._lock, self._cancel = threading.Lock(), cancel
        self._listener: Callable[[Event], Any] | None = None
        self.cancelled = False

    def cancel(self) -> None:
        """End it after the token or the piece of the prompt in progress."""
        self.cancelled = True
        self._cancel()

    def put(self, event: Event) -> None:
        """Called by the engine."""
        with self._lock:
            if self._listener is None:
                self._events.put(event)
            else:
                self._tell(event)

    def listen(self, listener: Callable[[Event], Any]) -> None:
        """Hand all events to a function, those that wait at once, later ones in the engine's thread: it must return
        soon. If it raises, the answer is cancelled."""
        with self._lock:
            self._listener = listener
            while not self._events.empty():
                self._tell(self._events.get())

    def _tell(self, event: Event) -> None:
        assert self._listener is not None
        try:
            self._listener(event)
        except Exception as error:  # its reader is gone; the engine has others
            logger.warning("an answer has lost its reader: %s", error)
            self.cancelled = True

    def __iter__(self) -> Iterator[Event]:
        event: Event | None = None
        while not isinstance(event, Finish):
            yield (event := self._events.get())
        self._events.put(event)  # whoever asks again is told so

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def forward(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        self.listen(forward)
        event: Event | None = None
        while not isinstance(event, Finish):
            yield (event := await events.get())

    def result(self) -> Result:
        """Wait for the end."""
        ids, text = list[int](), ""
        for event in self:
            if isinstance(event, Finish):
                return Result(ids, text, event)
            ids.append(event.id)
            text += event.text
        raise AssertionError


class Text:
    """The text of tokens that come one by one, as far as the next ones cannot change it.

    Args:
        stop: texts that end it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._context, self._given = 0, 0  # ids from `context` on are decoded; those before `given` have been
        self._held = ""  # may be the beginning of a stop
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that has become certain. Nothing comes after a stop (`stopped`)."""
        self._ids.append(token)
        return self._certain(self._new(whole=False), end=False)

    def rest(self) -> str:
        """The text that was held back."""
        return self._certain(self._new(whole=True), end=True)

    def _new(self, whole: bool) -> str:
        before = self._decode(self._ids[self._context : self._given])
        now = self._decode(self._ids[self._context :])
        if now.endswith("\ufffd") and not whole and len(self._ids) - self._given < HELD:
            return ""  # half a character
        self._context, self._given = self._given, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        found: str = self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""
        return found

    def _certain(self, new: str, end: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(found)
        held = 0 if found or end else max((_overlap(text, stop) for stop in self._stop), default=0)
        cut = min(found) if found else len(text) - held
        self._held = "" if found else text[cut:]
        return text[:cut]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_integer(name: str, value: Any, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        raise ConfigError(
            f"{name}={value!r}: expected an integer of at least {least}"
            + (f", at most {most}" if most is not None else "")
        )
