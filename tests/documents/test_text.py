import bz2
import gzip
import io
import lzma
import os
import sys
import threading
import tracemalloc
from pathlib import Path

import pytest

from ahn.documents import Piece, pieces, read_document
from ahn.documents.base import PIECE_CHARACTERS
from ahn.documents.text import Text
from ahn.errors import DocumentError

RUSSIAN = "Он вышел из дома рано утром и пошёл к реке, где его ждали друзья. "
JAPANESE = "彼は朝早く家を出て、川へ向かった。友達がそこで待っていた。"
CHINESE = "他清晨離開家，走向河邊，朋友們在那裡等他。"
FRENCH = "Le café était fermé, l’élève s’en alla déçu. “Hélas !” "
GREEK = "Βγήκε από το σπίτι νωρίς το πρωί. "
TEXTS = [RUSSIAN, JAPANESE, CHINESE, FRENCH, GREEK, "Plain words. "]


def read(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return read_document(path)


@pytest.mark.parametrize("end", ["", "\nA line.\n"])
@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"],
)
def test_unicode_with_and_without_a_mark(tmp_path: Path, encoding: str, end: str) -> None:
    for text in TEXTS:
        assert read(tmp_path / "a.txt", (text * 9 + end).encode(encoding)) == text * 9 + end


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("caf\xe9", "cp1252"),
        (FRENCH, "cp1252"),
        ("Die Straße ist für Fußgänger geöffnet. ", "latin-1"),
        (RUSSIAN, "cp1251"),
        (RUSSIAN, "koi8-r"),
        (GREEK, "cp1253"),
        (JAPANESE, "shift_jis"),
        (CHINESE, "big5"),
        (CHINESE, "gb18030"),
        ("그는 아침 일찍 집을 나와 강으로 갔다. ", "euc-kr"),
    ],
)
def test_legacy_encodings(tmp_path: Path, text: str, encoding: str) -> None:
    assert read(tmp_path / "a.txt", (text * 20).encode(encoding)) == text * 20


def test_a_few_broken_bytes_do_not_make_utf_8_something_else(tmp_path: Path) -> None:
    assert read(tmp_path / "a.txt", "é à ü ".encode() + b"\xff \xc3\xa9") == "é à ü \ufffd é"
    assert read(tmp_path / "a.txt", "é à ü é\ud800".encode("utf-8", "surrogatepass")) == "é à ü é\ufffd\ufffd\ufffd"
    assert read(tmp_path / "a.txt", b"\xff\xfe" + "ab\ud800c".encode("utf-16-le", "surrogatepass")) == "ab\ufffdc"


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
@pytest.mark.parametrize("before", range(-3, 2))
@pytest.mark.parametrize("behind", ["", " behind"])
def test_the_first_letter_beyond_ascii_at_the_border_of_a_block(
    tmp_path: Path, encoding: str, before: int, behind: str
) -> None:
    text = "a" * (PIECE_CHARACTERS + before) + "é" + behind
    assert read(tmp_path / "a.txt", text.encode(encoding)) == text


@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "cp1252"])
def test_line_ends_across_blocks(tmp_path: Path, encoding: str, shift: int) -> None:
    text = "x" * shift + "hé\r\nwo\rrl\nd\r\r\n" * 150_000
    assert len(text) > PIECE_CHARACTERS
    expected = text.replace("\r\n", "\n").replace("\r", "\n")
    assert read(tmp_path / "a.txt", text.encode(encoding)) == expected


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("way", ["file", "standard input"])
def test_pieces_are_bounded_and_make_up_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack, way) -> None:
    text = "😀 añb\r\n" * 300_000
    path = tmp_path / "a"
    path.write_bytes(pack(text.encode()))
    if way == "standard input":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
        found = list(pieces("-"))
    else:
        found = list(pieces(path))
        assert "".join(piece.text for piece in found) == read_document(path)
    assert all(isinstance(piece, Piece) and piece.page is None for piece in found)
    assert max(len(piece.text) for piece in found) <= PIECE_CHARACTERS < len(text)
    assert "".join(piece.text for piece in found) == text.replace("\r\n", "\n")


def test_packed_three_times_and_once_more(tmp_path: Path) -> None:
    data = gzip.compress(bz2.compress(gzip.compress(b"text", mtime=0)))
    assert read(tmp_path / "a.gz", data) == "text"
    with pytest.raises(DocumentError, match="compressed more than 3 times"):
        read(tmp_path / "a.gz", lzma.compress(data))


def test_the_extension_under_that_of_compression_counts(tmp_path: Path) -> None:
    assert read(tmp_path / "a.html.gz", gzip.compress(b"<p>some <b>text</b>", mtime=0)) == "some text\n"


class Endless(io.RawIOBase):
    """`text` again and again, at most `total` bytes, as a pipe gives it: in small and odd portions."""

    def __init__(self, text: bytes, total: int = 2**62) -> None:
        self.text, self.left = text, total

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        count = min(len(buffer), len(self.text), self.left)
        buffer[:count] = self.text[:count]
        self.left -= count
        return count


def feed(monkeypatch: pytest.MonkeyPatch, stream: io.RawIOBase) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(stream)))


def test_memory_is_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "It was a dark and stormy night, déjà vu.\n"
    feed(monkeypatch, Endless((line * 300).encode(), 100 * 2**20))
    tracemalloc.start()
    try:
        total = sum(len(piece.text) for piece in pieces("-"))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total > 90 * 2**20 and peak < 20 * 2**20


def test_endless_input_meets_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Text, "max_bytes", 5 * 2**20)
    feed(monkeypatch, Endless(b"y\n" * 3333))
    with pytest.raises(DocumentError, match="standard input: more than 5,242,880 bytes of text"):
        read_document("-")


def test_endless_zeros_are_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    feed(monkeypatch, Endless(bytes(4096)))
    with pytest.raises(DocumentError, match="standard input: not text .NUL at byte 0."):
        read_document("-")


def test_a_bomb_of_gzip_meets_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Text, "max_bytes", 5 * 2**20)
    with pytest.raises(DocumentError, match="more than 5,242,880 bytes of text"):
        read(tmp_path / "a.gz", gzip.compress(b"a " * 10 * 2**20, mtime=0))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_named_pipe_is_a_stream(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write() -> None:
        with pipe.open("wb") as file:
            for part in (b"\xc3", b"\xa9\r", b"\nb"):
                file.write(part)
                file.flush()

    writer = threading.Thread(target=write)
    writer.start()
    assert read_document(pipe) == "é\nb"
    writer.join()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"{\\rtf1 text}", "is RTF"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0", "not text (NUL at byte 8)"),
        (bytes(range(1, 256)), "not text (24 control characters)"),
        (gzip.compress(b"text" * 999, mtime=0)[:-9], "damaged gzip"),
        (gzip.compress(b"text", mtime=0) + b"rubbish", "damaged gzip"),
        (lzma.compress(b"text" * 999)[:-9], "damaged xz"),
        (bz2.compress(b"text" * 999)[:20], "damaged bzip2"),
        (gzip.compress(b"", mtime=0), "no text"),
    ],
)
def test_other_data_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(DocumentError) as error:
        read(tmp_path / "a", data)
    assert f"{tmp_path / 'a'}: " in str(error.value) and said in str(error.value)


def test_colours_of_a_terminal_and_form_feeds_are_text(tmp_path: Path) -> None:
    for text in ("\x1b[31mred\x1b[0m\n" * 20, "page\fpage", "BZh is no archive"):
        assert read(tmp_path / "a.log", text.encode()) == text
