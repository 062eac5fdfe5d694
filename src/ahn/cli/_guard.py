"""Standard streams that are safe to use, and errors as one line each."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ahn.errors import AHNError, ConfigError

DEBUG = "AHN_DEBUG"  # set to 1 for tracebacks
LONGEST = 600  # characters of an error


def open_streams() -> None:
    """Make the standard streams usable. Bytes that are not text become U+FFFD; characters that the encoding lacks
    become `\\u....`. Raises ConfigError if standard output is closed."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # otherwise the next opened file would get its number, and all that is printed
            os.open(os.devnull, os.O_RDWR)
    sys.stdin = sys.stdin or os.fdopen(0, encoding="utf-8")
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8")
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8")
        raise ConfigError(f"standard output is closed: expected a terminal, a file or a pipe, such as >{os.devnull}")
    if type(sys.stdout) is io.TextIOWrapper:
        sys.stdout = _Output(sys.stdout)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")


class _Output(io.TextIOWrapper):
    """Standard output whose errors name it. Those of the system name no file."""

    def __init__(self, plain: io.TextIOWrapper) -> None:
        self.plain = plain  # kept, because it would close the shared buffer when it is freed
        super().__init__(
            plain.buffer, plain.encoding, "backslashreplace", None, plain.line_buffering, plain.write_through
        )

    def write(self, text: str) -> int:
        with self._named():
            return super().write(text)

    def flush(self) -> None:
        with self._named():
            super().flush()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = "standard output"
            with suppress(OSError):  # the rest could not be written at the end of the process either
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            raise


def reason(error: BaseException, named: Callable[[str, Any], str] | None = None) -> str:
    """`error` as one line. `named`: how a command says a setting (`ahn.cli._options.namer`)."""
    if isinstance(error, AHNError):
        said = error.told(named) if named else str(error)
    elif isinstance(error, OSError):
        said = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without its import
        said = "out of memory: expected a smaller --chunk, --window or --base, or another --device"
    else:
        return f"{shortened(f'unexpected {type(error).__name__}: {error}')} ({DEBUG}=1 shows where)"
    return shortened(said)


def shortened(text: str) -> str:
    """`text` on one line, control characters and lone surrogates as escapes, its middle left out if it is long."""
    signs = " ".join(text.split())
    line = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in signs)
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
