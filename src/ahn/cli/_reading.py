"""Documents that a command reads into a memory: with progress, kept when stopped, gone on with later."""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ahn.cli._session import Session, console, size
from ahn.errors import AHNError, ConfigError, MemoryFileError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

    from ahn.dialogue import Dialogue
    from ahn.documents import Piece
    from ahn.memory.archive import Archive
    from ahn.memory.cache import AHNCache
    from ahn.tokens import Encoded

SHORT = 512  # tokens of blocks that are not worth counting
TRIED = 32  # documents that are opened before the model is loaded: enough for those named one by one
LARGE = 1_000_000  # bytes of documents that are announced before the model is loaded


def read_document_into(
    args: argparse.Namespace, memory: str | None = None, check: Callable[[Session], None] | None = None
) -> tuple[Session, str]:
    """Read the documents `args.document`, and save the memory as `args.output` if that is given.

    Where the output already holds the beginning of the same text, reading goes on from there.

    Args:
        args: with `document` (a list), `output`, `force` and the options of `add_model`.
        memory: a memory file to append to.
        check: is called with the session before anything is read.

    Returns:
        the session and a summary.

    Raises:
        ConfigError: the output exists and holds something else.
        DocumentError: a document cannot be read; said before the model is loaded where its first piece shows it.
        KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP, with a message. What was read is saved first, if it has a
            place.
        MemoryFileError: the memory could not be saved as `args.output`; says where it is.
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
        text = _resumed(args, memory, earlier, sources)
        if text is not None:
            session = Session(args, args.output)
            console.print(f"resumed {args.output}: it holds the first {text.skipped:,} tokens of this text")
        else:
            session = Session(args, memory)
            text = Text(_ids(session.dialogue, sources, earlier), sources)
            if not memory:
                session.introduce(text)
        if check is not None:
            check(session)
        text.keep_places(session.cache)
        before = session.cache.tokens_seen
        with finish_before_interrupt() as interrupted:  # also between reading and saving
            try:
                summary = session.read(text, args.chunk)
            except (KeyboardInterrupt, AHNError) as error:
                stopped = isinstance(error, KeyboardInterrupt)
                done = text.progress(session.cache.tokens_seen - text.read, "of")
                reason = f"interrupted after {done}" if stopped else str(error)
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


@dataclass
class Origin:
    """A document of several: its name, the character of the whole text that it begins at, and those of its own
    characters that pages begin at."""

    name: str
    start: int
    pages: list[tuple[int, int | None]] = field(default_factory=list)

    def texts(self, pieces: Iterable[Piece]) -> Iterator[str]:
        """Texts of the pieces, noting where pages begin."""
        offset = 0
        for piece in pieces:
            if not self.pages or self.pages[-1][1] != piece.page:
                self.pages.append((offset, piece.page))
            offset += len(piece.text)
            yield piece.text


class Sources:
    """Documents as one text, in pieces. A single one stands for itself; each of several follows its name."""

    def __init__(self, sources: list[Path | str]) -> None:
        self.sources = sources
        self.characters = 0  # of the pieces so far
        self.documents: list[Origin] = []  # begun so far
        self.done = 0  # bytes they came from, about

    def __str__(self) -> str:
        return str(self.sources[0]) if len(self.sources) == 1 else f"{len(self.sources):,} documents"

    @property
    def bytes(self) -> int | None:
        """Of all documents, None if one is no file."""
        sizes = [_size(source) for source in self.sources]
        return None if None in sizes else sum(filter(None, sizes))

    def __iter__(self) -> Iterator[str]:
        from ahn.dialogue import Stripped
        from ahn.documents import pieces

        self.characters, self.documents = 0, []
        before = 0
        several = len(self.sources) > 1
        for number, source in enumerate(self.sources):
            length, read = _size(source) or 0, 0
            origin = Origin(str(source), self.characters)
            texts: Iterable[str] = origin.texts(pieces(source))
            if several:
                heading = f"# {source}\n\n"
                heading = f"\n\n{heading}" if number else heading
                self.characters += len(heading)
                yield heading
                texts = stripped = Stripped(texts)
            for text in texts:
                if not self.documents or self.documents[-1] is not origin:
                    origin.start = self.characters - (stripped.skipped if several else 0)
                    self.documents.append(origin)
                self.characters += len(text)
                read += len(text.encode("utf-8", "replace"))
                self.done = before + min(read, length)
                yield text
            before += length


class Text(Iterator["Tensor"]):
    """Token ids of the documents, in pieces [T] for `ahn.read`, and how much of them the model has read."""

    def __init__(self, blocks: Iterator[Encoded], sources: Sources) -> None:
        self.sources = sources
        self.skipped = 0  # tokens that a memory held before
        self.read = 0  # by the model, and those skipped
        self._blocks = blocks
        self._ahead: deque[Encoded] = deque()
        self._given = 0  # tokens
        self._unread: deque[Encoded] = deque()  # of those given
        self._digest = hashlib.sha256()
        self._character = 0  # up to which the model has read
        self._archive: Archive | None = None
        self._ended = False  # whether all blocks are there
        self._error: AHNError | None = None  # that the next block ends with
        self._look()

    def keep_places(self, cache: AHNCache) -> None:
        """Note in the archive of the cache where the tokens that are given stand in their documents."""
        self._archive, self._origin = cache.archive, -1
        self._noted = self._character if self.skipped else -1  # documents that begin up to here are in the archive
        self._first = cache.tokens_seen - self.skipped  # where the text begins in all that was read

    def _locate(self, block: Encoded) -> None:
        archive, documents = self._archive, self.sources.documents
        if archive is None or not documents:
            return
        first = self._first + self._given
        of = np.searchsorted([origin.start for origin in documents], block.starts, side="right") - 1
        for index in range(max(self._origin, 0), len(documents)):
            here = np.flatnonzero((of == index) & (block.starts >= 0))
            if not len(here):
                continue
            origin = documents[index]
            if index > self._origin:
                if origin.start > self._noted:
                    archive.begin(origin.name, first + int(here[0]))
                self._origin = index
            offsets = block.starts[here] - origin.start
            pages = np.searchsorted([at for at, _ in origin.pages], offsets, side="right") - 1
            for low, high in pairwise([0, *(np.flatnonzero(np.diff(pages)) + 1).tolist(), len(here)]):
                page = origin.pages[max(int(pages[low]), 0)][1]
                archive.locate(first + int(here[low]), offsets[low:high], page)

    def _look(self) -> None:
        """Two blocks ahead, so that the end of a short text is known at once."""
        while sum(len(block.ids) > SHORT for block in self._ahead) < 2 and self._look_further():
            pass

    def _look_further(self) -> bool:
        if self._error is not None:
            raise self._error
        block = next(self._blocks, None)
        if block is None:
            self._ended = True
            return False
        self._ahead.append(block)
        return True

    def within(self, most: int) -> int | None:
        """Tokens in all, if they are at most so many. Of files the end is looked for as far ahead as that."""
        try:
            while self.sources.bytes is not None and self._in_sight <= most and self._look_further():
                pass
        except AHNError as error:  # where reading gets to it, what stands before is kept
            self._error = error
        return self._in_sight if self._ended and self._in_sight <= most else None

    @property
    def _in_sight(self) -> int:
        return self._given + sum(len(block.ids) for block in self._ahead)

    def __next__(self) -> Tensor:
        import torch

        if not self._ahead:
            raise StopIteration
        block = self._ahead.popleft()
        self._look()
        self._unread.append(block)
        self._locate(block)
        self._given += len(block.ids)
        return torch.from_numpy(block.ids.astype("int64"))

    @property
    def total(self) -> int | None:
        """Tokens in all, if the end of the text is in sight."""
        return self._in_sight if self._ended else None

    @property
    def fraction(self) -> float | None:
        """Of the text that was read, about; None if that cannot be known."""
        if self.total is not None:
            return self.read / max(self.total, 1)
        if not self.sources.bytes:
            return None
        share = min(1.0, self._character / max(self.sources.characters, 1))
        return min(1.0, share * self.sources.done / self.sources.bytes)

    def progress(self, before: int, of: str = "/") -> str:
        """Tokens read, and of how many where that is known. `before`: tokens of earlier texts."""
        between = of if of == "/" else f" {of} "
        if self.total is not None:
            return f"{before + self.read:,}{between}{before + self.total:,} tokens"
        share = "" if self.fraction is None else f" ({self.fraction:.1%} of {size(self.sources.bytes or 0)})"
        return f"{before + self.read:,} tokens{share}"

    def note(self, tokens: int) -> None:
        """That the model has read so many tokens of this text, those skipped included."""
        from ahn.tokens import Encoded

        while self.read < tokens:
            block = self._unread.popleft()
            count = min(tokens - self.read, len(block.ids))
            if count:
                self._digest.update(block.ids[:count].astype("<i4").tobytes())
                self._character = max(0, int(block.starts[count - 1]))
                self.read += count
            if count < len(block.ids):
                self._unread.appendleft(Encoded(block.ids[count:], block.starts[count:]))

    def skip(self, tokens: int, digest: str) -> bool:
        """Leave out the first tokens, if there are so many and they have this digest."""
        while self._given < tokens and self._ahead:
            next(self)
            self.note(min(tokens, self._given))
        if self.read < tokens or self._digest.hexdigest() != digest:
            return False
        self.skipped, self._given = tokens, tokens
        self._ahead.extendleft(reversed(self._unread))  # the rest of a block
        self._unread.clear()
        return True

    def described(self, complete: bool) -> dict[str, Any]:
        """For a memory file: how to know the text again."""
        return {"tokens": self.read, "sha256": self._digest.hexdigest(), "complete": complete}


def _is_same(source: Path | str, output: str) -> bool:
    with suppress(OSError, ValueError):
        return str(source) != "-" and os.path.samefile(source, output)
    return False


def _size(source: Path | str) -> int | None:
    if str(source) == "-":
        return None
    with suppress(OSError):
        return os.stat(source).st_size if os.path.isfile(source) else None
    return None


def _ids(dialogue: Dialogue, sources: Sources, earlier: list[dict[str, Any]]) -> Iterator[Encoded]:
    if not earlier:
        return dialogue.stream(sources)
    return dialogue.stream_more(sources, separated=earlier[-1]["complete"])


def _texts(memory: str) -> list[dict[str, Any]]:
    """The texts that a memory file holds, in order."""
    from ahn.memory.file import peek

    header = peek(memory)
    unknown = [{"tokens": header["tokens_seen"], "sha256": "", "complete": True}]
    texts = header.get("texts") or unknown
    return texts if sum(text["tokens"] for text in texts) == header["tokens_seen"] else unknown


def _resumed(
    args: argparse.Namespace, memory: str | None, earlier: list[dict[str, Any]], sources: Sources
) -> Text | None:
    """The rest of the text, if the output holds the beginning of it behind `earlier` texts; None if there is none yet.
    Of `earlier` the last one is removed where it is that beginning.

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
    from ahn.memory.file import peek

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
    """Save the memory. Ctrl-C waits for it; a second one does not.

    Raises:
        MemoryFileError: the disk refused; says where the memory was saved instead.
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
    if interrupted.is_set():  # for the one who waits for the end of the command
        signal.raise_signal(signal.SIGINT)
    return Path(output)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Within, the first SIGTERM or SIGHUP is a Ctrl-C, and further ones do nothing."""
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
