"""Runs a parser in a process of its own, with bounded memory, which any thread can end."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import IO

from ahn.documents.base import FORMATS, Format, Piece, bounded
from ahn.documents.source import Stream
from ahn.errors import DocumentError

MAX_SECONDS = 120  # from one piece to the next
MAX_CPU_SECONDS = 3600  # in case the reader of a parser is gone
MAX_CHARACTERS = 2**27  # of all pieces together
MAX_MEMORY = 4 * 2**30  # bytes of a parser

_BLOCK = 2**20
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from ahn.documents.isolate import child; "
    "child(*sys.argv[2:])"
)


def read_isolated(kind: Format, stream: Stream) -> Iterator[Piece]:
    """The pieces of `kind.read`, which runs in a child process.

    Raises:
        DocumentError: from the format, or because a limit was reached: bytes or characters of the document, seconds,
            or memory.
    """
    name, characters = stream.name, 0
    try:
        with _copy(kind, stream) as file:
            child = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, json.dumps(sys.path), kind.name, name, str(MAX_MEMORY)],
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
    except OSError as error:
        raise DocumentError(f"{name}: cannot be parsed ({error.strerror or error})") from error
    assert child.stdout is not None
    late = threading.Event()

    def stop() -> None:
        late.set()
        child.kill()

    try:
        while True:
            timer = threading.Timer(MAX_SECONDS, stop)
            timer.daemon = True
            timer.start()
            try:
                line = child.stdout.readline()
            finally:
                timer.cancel()
            if late.is_set():
                raise DocumentError(
                    f"{name}: parsing this {kind.title} took more than {MAX_SECONDS} seconds; expected less a page"
                )
            if not line.endswith(b"\n"):
                raise DocumentError(f"{name}: a damaged {kind.title} (its parser ended with status {child.wait()})")
            message = json.loads(line)
            if "error" in message:
                raise DocumentError(message["error"])
            if "end" in message:
                return
            piece = Piece(**message)
            characters += len(piece.text)
            if characters > MAX_CHARACTERS:
                limit = f"{MAX_CHARACTERS:,}"
                raise DocumentError(f"{name}: {kind.title} of more than {limit} characters; expected at most that many")
            yield piece
    finally:
        child.kill()
        child.stdout.close()
        child.wait()


@contextlib.contextmanager
def _copy(kind: Format, stream: Stream) -> Iterator[IO[bytes]]:
    """The rest of `stream` as a file that can seek."""
    with tempfile.TemporaryFile() as file:
        while block := stream.read(_BLOCK):
            if file.tell() + len(block) > kind.max_bytes:
                limit = f"{kind.max_bytes:,} bytes"
                raise DocumentError(f"{stream.name}: {kind.title} of more than {limit}; expected at most that many")
            file.write(block)
        file.seek(0)
        yield file


def child(kind: str, name: str, memory: str) -> None:
    """Parses standard input as `kind` and writes a line of JSON for each piece, an error, or the end."""
    out = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # a library that prints must not be taken for a piece
    with contextlib.suppress(
        ImportError, OSError, ValueError
    ):  # the system has no such limits, or has smaller ones set
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_SECONDS, MAX_CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))
    parser = FORMATS.get(kind)()
    try:
        for piece in bounded(parser.read(sys.stdin.buffer, name)):
            print(json.dumps({"text": piece.text, "page": piece.page}), file=out, flush=True)
        said = {"end": ""}
    except DocumentError as error:
        said = {"error": str(error)}
    except MemoryError:
        limit = f"{int(memory):,} bytes"
        said = {"error": f"{name}: parsing this {parser.title} needs more than {limit} of memory"}
    except Exception as error:  # parsers raise whatever a damaged object trips over: KeyError, RecursionError, ...
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        said = {"error": f"{name}: a damaged {parser.title} ({reason})"}
    print(json.dumps(said), file=out, flush=True)
    os._exit(0)  # freeing a deep tree can take longer than parsing it
