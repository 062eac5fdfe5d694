"""Ctrl-C while a memory is being written: it waits until the memory is whole again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any


class _Waiting:
    """Ctrl-C as the main thread has it: signals reach no other."""

    def __init__(self) -> None:
        self.users = 0  # of the handler
        self.depth = 0  # of what it waits for
        self.previous: Any = None  # the handler that was there
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
    """Within, Ctrl-C is only noted, and takes its effect at the end; a second one takes it at once. `ready`: it still
    takes its effect at once, but to enter this again inside is cheap, because setting a handler takes a while."""

    def __init__(self, ready: bool = False) -> None:
        self.waits = not ready

    def __enter__(self) -> None:
        self.mine = threading.get_ident() == threading.main_thread().ident
        if not self.mine:
            return
        if not _waiting.users:
            previous = signal.getsignal(signal.SIGINT)
            self.mine = callable(previous)  # else it is ignored, or left to the system
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
    """Within, Ctrl-C sets the event instead of breaking a chunk half-way; a second one breaks at once."""
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
