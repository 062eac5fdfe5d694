import gzip
import io
from pathlib import Path

import pytest
from made import DOCX, EPUB, archive, chapter, locked, pdf

from ahn.documents import Piece, isolate, pieces, read_document
from ahn.documents import archive as documents_archive
from ahn.errors import DocumentError

BODY = "word/document.xml"
LAUGHS = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]>'
OUTSIDE = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///dev/null">]>'
ENCRYPTION = (
    '<encryption xmlns:enc="http://www.w3.org/2001/04/xmlenc#"><enc:EncryptedData><enc:CipherData>'
    '<enc:CipherReference URI="OEBPS/a.xhtml"/></enc:CipherData></enc:EncryptedData></encryption>'
)


def nested(tags: str, times: int) -> str:
    """The body of a DOCX with these elements in each other so many times."""
    start = "".join(f"<w:{tag}>" for tag in tags.split())
    end = "".join(f"</w:{tag}>" for tag in reversed(tags.split()))
    before, after = DOCX[BODY].split("<w:body>")
    return f"{before}<w:body>{start * times}<w:p><w:r><w:t>Deep</w:t></w:r></w:p>{end * times}{after}"


@pytest.mark.parametrize("name", ["a.epub", "a.EPUB", "download", "a.zip", "a.epub.gz"])
def test_epub(tmp_path: Path, name: str) -> None:
    path, data = tmp_path / name, archive(EPUB)
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert list(pieces(path)) == [
        Piece("One\n\nOf cafés & rain.\n", 1),
        Piece("\nTwo\n\nOf cafés & rain.\n", 2),
    ]


@pytest.mark.parametrize("name", ["a.docx", "a.DOCX", "download"])
def test_docx(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(archive(DOCX))
    assert read_document(path) == "One <p>\n\nIn a control\n\nInserted\n\na | b\n"


@pytest.mark.parametrize("tags", ["tbl tr tc", "sdt sdtContent", "ins", "p r txbxContent"])
def test_a_docx_as_deep_as_is_allowed(tmp_path: Path, tags: str) -> None:
    path = tmp_path / "a.docx"
    path.write_bytes(archive(DOCX | {BODY: nested(tags, 995 // len(tags.split()))}))
    assert "Deep" in read_document(path)


def test_a_chapter_that_is_named_again_is_read_once(tmp_path: Path) -> None:
    path, package = tmp_path / "a.epub", EPUB["OEBPS/book.opf"]
    start, end = package.split("</spine>")
    path.write_bytes(
        archive(
            EPUB | {"OEBPS/book.opf": f"{start}{package.split('<spine>')[1].split('</spine>')[0] * 99}</spine>{end}"}
        )
    )
    assert [piece.page for piece in pieces(path)] == [1, 2]


@pytest.mark.parametrize("name", ["a.epub", "a.docx"])
def test_more_characters_than_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(archive(EPUB if name.endswith("epub") else DOCX))
    size = len(read_document(path))
    monkeypatch.setattr(isolate, "MAX_CHARACTERS", size)
    read_document(path)
    monkeypatch.setattr(isolate, "MAX_CHARACTERS", size - 1)
    with pytest.raises(DocumentError, match=rf"more than {size - 1} characters; expected at most that many"):
        read_document(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.docx", b"no archive", "damaged DOCX"),
        ("a.epub", b"no archive", "damaged EPUB"),
        ("a.epub", archive(EPUB)[:300], "damaged EPUB"),
        ("a.docx", archive({"content.xml": "x"}), "damaged DOCX"),
        ("a.zip", archive({"content.txt": "x"}), "not text"),
        ("a.epub", archive(EPUB | {"../../etc/x": "x"}), "damaged EPUB (../../etc/x points outside of it)"),
        ("a.docx", archive(DOCX | {"/etc/x": "x"}), "damaged DOCX (/etc/x points outside of it)"),
        ("a.docx", archive(DOCX | {"a\\..\\..\\x": "x"}), "points outside of it"),
        ("a.epub", archive(EPUB | {"META-INF/encryption.xml": ENCRYPTION}), "without copy protection"),
        ("a.epub", locked(archive(EPUB)), "an encrypted EPUB"),
        ("a.docx", locked(archive(DOCX)), "an encrypted DOCX"),
        ("a.epub", archive({k: v for k, v in EPUB.items() if "a.xhtml" not in k}), "damaged EPUB"),
        ("a.epub", archive(EPUB | {"OEBPS/a.xhtml": "<p>" + "a " * 20_000_000}), "expected at most 33,554,432"),
        ("a.docx", archive(DOCX | {BODY: "<p>" + "a " * 20_000_000}), "expected at most 33,554,432"),
        (
            "a.docx",
            archive({str(n): "" for n in range(20_001)} | {"word/x": ""}),
            "20,002 files; expected at most 20,000",
        ),
        ("a.docx", archive(DOCX | {BODY: LAUGHS + DOCX[BODY]}), "declares XML entities; expected none"),
        ("a.docx", archive(DOCX | {BODY: OUTSIDE + DOCX[BODY]}), "declares XML entities; expected none"),
        ("a.epub", archive(EPUB | {"OEBPS/book.opf": LAUGHS + EPUB["OEBPS/book.opf"]}), "declares XML entities"),
        (
            "a.docx",
            archive(DOCX | {BODY: "<a>" * 100_000 + "</a>" * 100_000}),
            "more than 1,000 elements in each other",
        ),
        ("a.docx", archive(DOCX | {BODY: nested("sdt sdtContent", 501)}), "expected at most that many"),
        ("a.epub", archive(EPUB | {"OEBPS/a.xhtml": "<div>" * 100_000}), "more than 10,000 <div> in each other"),
    ],
)
def test_bad_archives(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DocumentError) as error:
        read_document(path)
    assert f"{path}: " in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


def test_a_bomb_of_many_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_archive, "MAX_UNPACKED", 10_000)
    data = io.BytesIO(archive(EPUB | {f"{n}.png": bytes(1000) for n in range(10)}))
    with (
        pytest.raises(DocumentError, match="a.epub: EPUB unpacks to 1.,.* bytes; expected at most 10,000"),
        documents_archive.open_archive(data, "a.epub", "EPUB"),
    ):
        pass


def test_entities_of_a_chapter_are_not_expanded(tmp_path: Path) -> None:
    path = tmp_path / "a.epub"
    path.write_bytes(archive(EPUB | {"OEBPS/a.xhtml": LAUGHS + chapter("One &b;")}))
    assert read_document(path).count("ha") < 4


def test_first_bytes_say_more_than_the_extension(tmp_path: Path) -> None:
    path = tmp_path / "a.docx"
    path.write_bytes(pdf("Call me Ishmael."))
    assert read_document(path) == "Call me Ishmael.\n"
