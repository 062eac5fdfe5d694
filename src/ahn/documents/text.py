"""Plain text, which Markdown and CSV are too, in the encoding that it seems to be in."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from typing import BinaryIO

from ahn.documents.base import ALLOWED, PIECE_CHARACTERS, Format, Piece
from ahn.documents.encoding import binary, guess, marked, wide
from ahn.errors import DocumentError


class Text(Format):
    """The encoding is that of the byte order mark, else UTF-16 or UTF-32 if the zero bytes of the first block say so,
    else it is chosen at the first block with a byte beyond ASCII. So any length is read in one pass and constant
    memory, and from a pipe as from a file."""

    name = "text"
    title = "file"
    max_bytes = 8 * 2**30
    isolated = False

    def marks(self, head: bytes) -> bool:
        return bool(marked(head) or wide(head)) or not (binary(head) or head.startswith(b"{\\rtf"))

    def read(self, file: BinaryIO, name: str) -> Iterator[Piece]:
        block, total, decode = file.read(PIECE_CHARACTERS), 0, None
        if encoding := marked(block) or wide(block):
            decode = codecs.getincrementaldecoder(encoding)("replace").decode
        elif block.startswith(b"{\\rtf"):
            raise DocumentError(f"{name}: is RTF; {ALLOWED}")
        elif reason := binary(block):
            raise DocumentError(f"{name}: not text ({reason}); {ALLOWED}")
        lines = io.IncrementalNewlineDecoder(None, translate=True)
        while True:
            total += len(block)
            if total > self.max_bytes:
                raise DocumentError(f"{name}: more than {self.max_bytes:,} bytes of text; expected at most that many")
            if decode is None and not block.isascii():
                more = file.read(8)  # so that a character cut at the end of the block is no evidence
                block, total = block + more, total + len(more)
                decode = codecs.getincrementaldecoder(guess(block, not more))("replace").decode
            end = not block
            text = decode(block, end) if decode else block.decode("ascii")
            text = lines.decode(text, end).replace("\0", "\ufffd")
            if text:
                yield Piece(text)
            if end:
                return
            block = file.read(PIECE_CHARACTERS)
