"""Ctrl-C while a memory is being written: it waits until the memory is whole again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def deferred() -> Iterator[None]:
    """Within, Ctrl-C is only noted, and takes its effect at the end; a second one takes it at once. Signals reach the
    main thread alone, so nothing happens in others."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGINT)
    if not callable(previous):  # ignored, or left to the system
        yield
        return
    noted: list[tuple[int, Any]] = []

    def note(number: int, frame: Any) -> None:
        noted.append((number, frame))
        if len(noted) > 1:
            previous(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if noted:
            previous(*noted[0])
