"""Commands as they are typed."""

import io
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ahn.cli import _session

TEXT = "The old cat sat on the mat and looked at 12 mice.\n\n" * 60
SMALL = ("--window", "24", "--sinks", "8", "--max-new-tokens", "8")


def type_in(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def interrupt_reading(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    @contextmanager
    def progress(self: Any, total: int, began: float) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, total: signal.raise_signal(signal.SIGINT) if done >= after else None

    monkeypatch.setattr(_session.Session, "_progress", progress)
