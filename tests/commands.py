"""Commands as they are typed."""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import pytest

from ahn import cli
from ahn.cli import _session

TEXT = "The old cat sat on the mat and looked at 12 mice.\n\n" * 60
SMALL = ("--window", "24", "--sinks", "8", "--max-new-tokens", "8")


def forked(*argv: str, before: Callable[[], None] = lambda: None) -> tuple[int, TextIO]:
    """A command in a process of its own that need not import anything: its id, and its standard error to read from."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        code = 1
        try:
            os.dup2(writing, 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            before()
            code = cli.main(argv)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    return process, os.fdopen(reading)


def type_in(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def interrupt_reading(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    @contextmanager
    def progress(self: Any, total: int, began: float) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, total: signal.raise_signal(signal.SIGINT) if done >= after else None

    monkeypatch.setattr(_session.Session, "_progress", progress)
