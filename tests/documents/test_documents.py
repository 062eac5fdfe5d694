import io
import sys
from pathlib import Path

import pytest
from made import encrypted, pdf

from ahn.documents import read_document
from ahn.errors import DocumentError

HTML = b"""<!DOCTYPE html><html><head><title>A tale</title><style>p {color: red}</style>
<script>var hidden = "<p>";</script></head><body><!-- not shown -->
<h1>Chapter&nbsp;1</h1><p>It was <b>a</b>
dark &amp; stormy night.<br>Rain fell.</p><pre>  kept
   as is</pre><ul><li>one</li><li>two</li></ul></body></html>"""


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.log", "noextension"])
def test_text_is_read_as_it_is(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("# Títle\n\n* a  b\n", encoding="utf-8")
    assert read_document(path) == read_document(str(path)) == "# Títle\n\n* a  b\n"


@pytest.mark.parametrize(
    "data",
    [
        b"a\nb\n\xc3\xa9",
        b"\xef\xbb\xbfa\r\nb\r\xc3\xa9",
        "a\r\nb\né".encode("utf-16"),
        b"\xfe\xff" + "a\nb\né".encode("utf-16-be"),
    ],
)
def test_marks_and_line_ends_are_normalised(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    assert read_document(path) == "a\nb\né"


@pytest.mark.parametrize("name", ["a.html", "a.htm", "saved"])
def test_html_gives_what_a_reader_sees(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(HTML)
    text = read_document(path)
    assert "Chapter 1\n" in text
    assert "It was a dark & stormy night.\nRain fell.\n" in text
    assert "kept\n   as is" in text
    assert "one\n" in text
    assert not any(word in text for word in ("hidden", "color", "not shown", "DOCTYPE", "<"))


def test_html_in_its_declared_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    path.write_bytes('<html><head><meta charset="iso-8859-1"></head><p>café</p></html>'.encode("latin-1"))
    assert "café" in read_document(path)


@pytest.mark.parametrize("name", ["a.pdf", "a.PDF", "download"])
def test_pdf(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(pdf("Call me Ishmael."))
    assert read_document(path) == "Call me Ishmael.\n"


def test_pdf_that_opens_without_a_password(tmp_path: Path) -> None:
    path = tmp_path / "a.pdf"
    path.write_bytes(encrypted(pdf("Call me Ishmael."), ""))
    assert read_document(path) == "Call me Ishmael.\n"


@pytest.mark.parametrize("data", [b"some text\r\n", HTML, pdf("some text")])
def test_standard_input(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read_document("-").strip()


def test_long_html_is_quick(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    path.write_bytes(b"<html>" + b"<p>some <i>words</i> here</p>\n" * 20_000)
    assert read_document(path).count("some words here") == 20_000


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\t\r\n", "no text"),
        ("a.txt", b"\xef\xbb\xbf", "no text"),
        ("a.txt", b"text\0text", "NUL at byte 4"),
        ("a.docx", b"PK\x03\x04\xff\xfe\x00", "damaged DOCX"),
        ("a.html", b"<html><script>x</script></html>", "no text"),
        ("a.pdf", pdf(""), "no text in this PDF"),
        ("a.pdf", b"%PDF-1.4\nrubbish", "damaged PDF"),
        ("a.pdf", b"not a PDF", "damaged PDF"),
        ("a.pdf", pdf("x")[:200], "damaged PDF"),
        ("a.pdf", encrypted(pdf("secret"), "password"), "encrypted PDF"),
    ],
)
def test_bad_documents_name_the_file_and_the_reason(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DocumentError) as error:
        read_document(path)
    assert str(path) in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


def test_missing_folder_and_nothing_on_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DocumentError, match="no such file"):
        read_document(tmp_path / "missing.txt")
    with pytest.raises(DocumentError, match="is a folder"):
        read_document(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(DocumentError, match="standard input: is empty"):
        read_document("-")
