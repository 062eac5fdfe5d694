"""Reads documents into a memory, with progress. A reading that was stopped is saved and can be continued."""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahn.cli._console import console, size
from ahn.cli._session import Session, how_far
from ahn.errors import AHNError, ConfigError, MemoryFileError, OutputError
from ahn.texts import Sources, Text

if TYPE_CHECKING:
    from ahn.dialogue import Dialogue
    from ahn.tokens import Encoded

TRIED = 32  # documents opened before the model is loaded; covers those that were named one by one
LARGE = 1_000_000  # from so many bytes on, documents are announced before the model is loaded


class NothingNewError(Exception):
    """The memory to append to holds all documents already."""


def read_document_into(
    args: argparse.Namespace, memory: str | None = None, question: str | None = None
) -> tuple[Session, str]:
    """Read the documents `args.document`, and save the memory as `args.output` if that is given.

    If the output already holds the beginning of the same text, reading continues behind it.

    Args:
        args: with `document` (a list), `output`, `force` and the options of `add_model`.
        memory: a memory file to append to.
        question: one that will be asked; errors that it leads to come before anything is read.

    Returns:
        the session and a summary.

    Raises:
        NothingNewError: see there. Each document was named.
        ConfigError: the output exists and holds something else.
        DocumentError: a document cannot be read. Raised before the model is loaded if the first piece shows it.
        KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP, with a message. The part that was read is saved first, if
            there is an output.
        MemoryFileError: the memory could not be saved as `args.output`; the message says where it is instead.
    """
    from ahn.documents import check as check_document
    from ahn.documents import expand
    from ahn.files import check_writable, claimed

    check_writable(args.output)
    sources = Sources(expand(args.document))
    if args.output and any(_is_same(source, args.output) for source in sources.sources):
        raise ConfigError(f"-o {args.output}: is one of the documents; expected another name")
    if not console.is_terminal and (sources.bytes or 0) > LARGE:
        console.print(f"opening {sources}, {size(sources.bytes or 0)}")
    for source in sources.sources[:TRIED]:
        check_document(source)
    with _terminated_like_interrupted(), claimed(args.output) if args.output else nullcontext():
        from ahn.interrupts import finish_before_interrupt

        earlier = _texts(memory) if memory else []
        if not args.force:
            _skip_known(sources, memory, earlier)
        text = _resumed(args, memory, earlier, sources)
        if text is not None:
            session = Session(args, args.output, question)
            console.print(f"resumed {args.output}: it holds the first {text.skipped:,} tokens of this text")
        else:
            session = Session(args, memory, question)
            text = Text(_ids(session.dialogue, sources, earlier), sources)
            if not memory:
                session.introduce(text)
        if question is not None:
            session.check(question, args)
        text.keep_places(session.cache)
        before = session.cache.tokens_seen
        with finish_before_interrupt() as interrupted:  # also between reading and saving
            try:
                summary = session.read(text, args.chunk)
            except (KeyboardInterrupt, AHNError) as error:
                stopped = isinstance(error, KeyboardInterrupt)
                done = how_far(text, session.cache.tokens_seen - text.read, " of ")
                reason = error.told(args.named) if isinstance(error, AHNError) else f"interrupted after {done}"
                if session.cache.tokens_seen == before:
                    raise KeyboardInterrupt(reason) if stopped else error from None
                if not args.output:
                    raise type(error)(f"{reason}; -o FILE would have kept them") from None
                _save(session, args.output, [*earlier, text.described(complete=False)])
                console.print("the same command goes on from there")
                raise type(error)(f"{reason}, which are kept in {args.output}") from None
            if args.output and session.cache.texts != [*earlier, text.described(complete=True)]:
                file = _save(session, args.output, [*earlier, text.described(complete=True)])
                console.print(f"saved   {args.output}, {size(file.stat().st_size)}")
        if interrupted.is_set():
            raise KeyboardInterrupt(f"interrupted; the memory is kept in {args.output}" if args.output else "")
    return session, summary


def _skip_known(sources: Sources, memory: str | None, earlier: list[dict[str, Any]]) -> None:
    """Leave out documents that are there twice or in the memory already, and say so."""
    known = [document for text in earlier for document in text.get("documents", [])]
    for source in sources.drop_known(known):
        where = "named twice" if source in sources.sources else f"in {memory} already"
        console.print(f"skipped {source}: {where}; --force reads it again")
    if not sources.sources:
        raise NothingNewError


def _is_same(source: Path | str, output: str) -> bool:
    with suppress(OSError, ValueError):
        return str(source) != "-" and os.path.samefile(source, output)
    return False


def _ids(dialogue: Dialogue, sources: Sources, earlier: list[dict[str, Any]]) -> Iterator[Encoded]:
    if not earlier:
        return dialogue.stream(sources)
    return dialogue.stream_more(sources, separated=earlier[-1]["complete"])


def _texts(memory: str) -> list[dict[str, Any]]:
    """The texts that a memory file holds, in order."""
    from ahn.memory.file_format import peek

    header = peek(memory)
    unknown = [{"tokens": header["tokens_seen"], "sha256": "", "complete": True}]
    texts = header.get("texts") or unknown
    return texts if sum(text["tokens"] for text in texts) == header["tokens_seen"] else unknown


def _resumed(
    args: argparse.Namespace, memory: str | None, earlier: list[dict[str, Any]], sources: Sources
) -> Text | None:
    """The rest of the text, if the output holds its beginning after the `earlier` texts; None if there is no output
    yet. If that beginning is the last of the `earlier` texts, it is removed from them.

    Raises:
        ConfigError: the output holds something else.
    """
    if not args.output or args.force or not os.path.exists(args.output):
        return None
    in_place = memory is not None and os.path.samefile(memory, args.output)
    try:
        held = _texts(args.output)
    except MemoryFileError:
        held = []
    last = held[-1] if held and held[:-1] == (earlier[:-1] if in_place else earlier) else None
    if last is not None and last["sha256"] and not (in_place and last["complete"]):
        text = _same_beginning(args, held[:-1], last, sources)
        if text is not None:
            if in_place:
                earlier.pop()
            return text
    if in_place:
        return None
    what = "a memory of another text" if held else "no memory file"
    raise ConfigError(
        f"-o {args.output}: exists and is {what}; expected another name, --force to replace it"
        + (f", or --memory {args.output} to append to it" if held and memory is None else "")
    )


def _same_beginning(
    args: argparse.Namespace, earlier: list[dict[str, Any]], last: dict[str, Any], sources: Sources
) -> Text | None:
    from ahn.bases import load_tokenizer
    from ahn.dialogue import Dialogue
    from ahn.memory.file_format import peek

    base = args.base or peek(args.output).get("base")
    if not base:
        return None
    with console.status(f"comparing {sources} with {args.output}"):
        text = Text(_ids(Dialogue(load_tokenizer(base)), sources, earlier), sources)
        if text.skip(last["tokens"], last["sha256"]):
            return text
    if "-" in sources.sources:
        raise ConfigError(
            f"-o {args.output}: exists and does not hold the text of standard input; expected another name"
        )
    return None


def _save(session: Session, output: str, texts: list[dict[str, Any]]) -> Path:
    """Save the memory. The first Ctrl-C waits until it is saved, the second does not.

    Raises:
        MemoryFileError: the file could not be written; the message says where the memory was saved instead.
    """
    from ahn.hub import cache_folder
    from ahn.interrupts import finish_before_interrupt

    session.cache.texts = texts
    with finish_before_interrupt() as interrupted:
        try:
            session.cache.save(output)
        except MemoryFileError as error:
            if not isinstance(error.__cause__, OutputError):
                raise
            name = f"{Path(output).stem}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.ahn"
            for folder in (cache_folder() / "rescued", Path(tempfile.gettempdir())):
                with suppress(OSError, MemoryFileError):
                    folder.mkdir(parents=True, exist_ok=True)
                    session.cache.save(folder / name)
                    rescued = folder / name
                    break
            else:
                raise
            raise MemoryFileError(f"{error}; the memory is in {rescued}") from error
    if interrupted.is_set():  # the caller handles it once the command is done
        signal.raise_signal(signal.SIGINT)
    return Path(output)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Within, the first SIGTERM or SIGHUP acts as Ctrl-C, and later ones are ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended = False

    def end(number: int, frame: Any) -> None:
        nonlocal ended
        if ended:
            return
        ended = True
        if callable(signal.getsignal(signal.SIGINT)):
            signal.raise_signal(signal.SIGINT)
        else:  # ignored, as in a script's background
            raise KeyboardInterrupt

    names = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = {number: signal.getsignal(number) for number in names}
    for number, handler in previous.items():
        if handler != signal.SIG_IGN:  # nohup
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
