import io
import sys
import textwrap
import zlib
from pathlib import Path

import pytest
from made import encrypted, pdf, pdf_of

from ahn.documents import Piece, pieces, read_document
from ahn.documents.pdf import PDF, join_lines
from ahn.errors import DocumentError

TALE = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, "
    "it was the epoch of belief, it was the epoch of incredulity, it was the season of Light, they said at the time."
)
KINGS = (
    "There were a king with a large jaw and a queen with a plain face, on the throne of England; there were a king "
    "with a large jaw and a queen with a fair face, on the throne of France. In both countries it was clear to all."
)


def read(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return read_document(path)


@pytest.mark.parametrize("width", [40, 60, 90])
def test_wrapped_lines_become_paragraphs(tmp_path: Path, width: int) -> None:
    lines = ["Chapter 1", *textwrap.wrap(TALE, width), *textwrap.wrap(KINGS, width)]
    text = read(tmp_path / "a.pdf", pdf([line.replace(" ", "  ") for line in lines]))
    assert text == f"Chapter 1\n{TALE}\n{KINGS}\n"


def test_rows_items_and_verse_stay() -> None:
    rows = "\n".join(f"{month} {n} 1{n}.50 {n}2 EUR in the end" for n, month in enumerate(["May", "June"] * 9))
    items = f"1. {TALE[:81]}\n2. {TALE[:77]}\n- {TALE[:81]}"
    verse = "Tyger Tyger, burning bright,\nIn the forests of the night;\nWhat hand\nCould frame thy fearful symmetry"
    for text in (rows, items, verse, "short\nlines\nhere"):
        assert join_lines(text, set()) == text


@pytest.mark.parametrize(
    ("lines", "joined"),
    [
        ("the memory of an old ele-\nphant in the garden of the king", "elephant"),
        ("they are a well-known and a well-\nknown pair, known and well", "a well-known"),
        ("an Anglo-\nSaxon kingdom of long ago, so they say", "Anglo-Saxon"),
    ],
)
def test_hyphens_at_line_ends(lines: str, joined: str) -> None:
    assert joined in join_lines(f"{lines}\n{TALE[:44]}", set())


def test_soft_hyphens_and_chinese_lines() -> None:
    lines = "他清晨離開家走向河邊朋友們在那裡等他他清晨離開家走向河邊朋友們\n在那裡等他"
    assert join_lines(lines, set()) == lines.replace("\n", "")


def test_long_lines_are_quick() -> None:
    for line in ("x" * 1_000_000, "." * 1_000_000, "x-" * 500_000, "- " * 500_000):
        assert len(join_lines(f"{line}\n{line}", set())) >= 1_999_999


def test_pages_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(pdf("One.", "", "Three."))
    assert list(pieces(path)) == [Piece("One.\n", 1), Piece("\nThree.\n", 3)]
    assert read_document(path) == "One.\n\nThree.\n"


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["RC4-40", "RC4-128", "AES-128", "AES-256", "AES-256-R5"])
def test_encrypted(tmp_path: Path, algorithm: str) -> None:
    assert read(tmp_path / "a.pdf", encrypted(pdf("Call me Ishmael."), "", algorithm)) == "Call me Ishmael.\n"
    with pytest.raises(DocumentError, match="an encrypted PDF; expected one that opens without a password"):
        read(tmp_path / "a.pdf", encrypted(pdf("Call me Ishmael."), "secret", algorithm))


def test_characters_that_are_no_text(tmp_path: Path) -> None:
    names = ["0066FB01", "E000", "D800", "F0B7", "0000", "0041"]
    table = "".join(f"<{code:02X}> <{name}> " for code, name in enumerate(names, 1))
    cmap = (
        "/CIDInit /ProcSet findresource begin 12 dict begin begincmap 1 begincodespacerange <00> <FF> "
        f"endcodespacerange {len(names)} beginbfchar {table}endbfchar endcmap end end"
    ).encode()
    font = "<< /Type /Font /Subtype /Type1 /BaseFont /Foo /ToUnicode 4 0 R >>"
    stream = b"<< /Length %d >>\nstream\n%s\nendstream" % (len(cmap), cmap)
    data = pdf("<010203040506>", font=font, more=[stream])
    assert read(tmp_path / "a.pdf", data) == "ffi\ufffd\ufffd•A\n"
    with pytest.raises(DocumentError, match="do not name their letters; it needs OCR first"):
        read(tmp_path / "a.pdf", pdf(f"<{'02' * 200}>", font=font, more=[stream]))


CATALOG = b"<< /Type /Catalog /Pages 2 0 R >>"
LOOP = [CATALOG, b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>", b"<< /Type /Pages /Kids [2 0 R 2 0 R] /Count 1 >>"]
COUNT = [CATALOG, b"<< /Type /Pages /Kids [] /Count 1000000000 >>"]
DEEP = [CATALOG, b"[" * 100_000 + b"]" * 100_000]


@pytest.mark.parametrize(
    ("objects", "said"), [(LOOP, "damaged PDF"), (COUNT, "no text in this PDF"), (DEEP, "damaged PDF")]
)
def test_pages_without_end(tmp_path: Path, objects: list[bytes], said: str) -> None:
    with pytest.raises(DocumentError, match=said):
        read(tmp_path / "a.pdf", pdf_of(objects))


@pytest.mark.slow
def test_a_bomb(tmp_path: Path) -> None:
    packed = zlib.compress(b"(x) Tj " * 30_000_000, 9)
    page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] /Contents 4 0 R /Resources << /Font << >> >> >>"
    content = b"<< /Length %d /Filter /FlateDecode >>\nstream\n%s\nendstream" % (len(packed), packed)
    with pytest.raises(DocumentError, match="a.pdf: a damaged PDF .page 1: "):
        read(tmp_path / "a.pdf", pdf_of([CATALOG, b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>", page, content]))


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PDF, "max_bytes", 500)
    with pytest.raises(DocumentError, match="a.pdf: PDF of more than 500 bytes; expected at most that many"):
        read(tmp_path / "a.pdf", pdf("text"))


def test_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(pdf("text"))))
    assert read_document("-") == "text\n"
