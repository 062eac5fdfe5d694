"""Delays Ctrl-C while a memory is being written, until the memory is whole again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any


class _Waiting:
    """The state of Ctrl-C in the main thread, the only one that gets signals."""

    def __init__(self) -> None:
        self.users = 0  # nested blocks that use the handler
        self.depth = 0  # nested blocks that delay the signal
        self.previous: Any = None  # the handler before
        self.noted: list[tuple[int, Any]] = []

    def note(self, number: int, frame: Any) -> None:
        if not self.depth or self.noted:
            self.previous(number, frame)
        else:
            self.noted.append((number, frame))

    def deliver(self) -> None:
        if self.noted:
            first, self.noted = self.noted[0], []
            self.previous(*first)


_waiting = _Waiting()


class deferred:  # noqa: N801 - used as a function
    """A context in which Ctrl-C takes effect only at the end. A second Ctrl-C takes effect at once.

    Args:
        ready: do not delay Ctrl-C yet, but set the handler, so that contexts inside this one are cheap to enter.
    """

    def __init__(self, ready: bool = False) -> None:
        self.waits = not ready

    def __enter__(self) -> None:
        self.mine = threading.get_ident() == threading.main_thread().ident
        if not self.mine:
            return
        if not _waiting.users:
            previous = signal.getsignal(signal.SIGINT)
            self.mine = callable(previous)  # otherwise the signal is ignored, or left to the system
            if not self.mine:
                return
            _waiting.previous = previous
            signal.signal(signal.SIGINT, _waiting.note)
        _waiting.users += 1
        _waiting.depth += self.waits

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.mine:
            return
        _waiting.users -= 1
        _waiting.depth -= self.waits
        if not _waiting.users:
            signal.signal(signal.SIGINT, _waiting.previous)
        if not _waiting.depth:
            _waiting.deliver()


@contextmanager
def finish_before_interrupt() -> Iterator[threading.Event]:
    """A context in which Ctrl-C sets an event instead of breaking off a chunk. A second Ctrl-C breaks off at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def note(number: int, frame: Any) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
