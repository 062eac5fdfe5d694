"""Documents of any bytes: refused, or text."""

import bz2
import gzip
import io
import lzma
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ahn.documents import read_document
from ahn.errors import DocumentError
from damage import damaged
from effort import bounded, fuzz

pytestmark = pytest.mark.slow

PAGE = "<html><head><title>t</title></head><body><h1>A</h1><p>b &amp; c<table><tr><td>1<td>2</table></body></html>"
TEXT = "One line.\nAnother: é, 漢字, 😀\r\n"


def archive(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in files.items():
            file.writestr(name, text)
    return out.getvalue()


def pdf():
    from pypdf import PdfWriter

    writer, out = PdfWriter(), io.BytesIO()
    writer.add_blank_page(200, 50)
    writer.add_metadata({"/Title": "t"})
    writer.write(out)
    return out.getvalue()


CONTAINER = '<container><rootfiles><rootfile full-path="a.opf"/></rootfiles></container>'
PACKAGE = '<package><manifest><item id="p" href="p.html"/></manifest><spine><itemref idref="p"/></spine></package>'
BODY = '<w:document xmlns:w="w"><w:body><w:p><w:r><w:t>a b</w:t></w:r></w:p></w:body></w:document>'
PLAIN = {
    ".txt": TEXT.encode(),
    ".md": TEXT.encode("utf-16"),
    ".csv": TEXT.encode("cp1252", "replace"),
    ".txt.gz": gzip.compress(TEXT.encode()),
    ".txt.bz2": bz2.compress(TEXT.encode()),
    ".txt.xz": lzma.compress(TEXT.encode()),
}
PARSED = {
    ".html": PAGE.encode(),
    ".html.gz": gzip.compress(PAGE.encode()),
    ".pdf": pdf(),
    ".epub": archive(
        {"mimetype": "application/epub+zip", "META-INF/container.xml": CONTAINER, "a.opf": PACKAGE, "p.html": PAGE}
    ),
    ".docx": archive({"[Content_Types].xml": "<Types/>", "word/document.xml": BODY}),
}


def check(data, suffix, folder):
    path = folder / f"document{suffix}"
    path.write_bytes(data)
    with bounded(folder, DocumentError) as refused:
        text = read_document(path)
    if not refused:
        assert text.strip()
        assert "\r" not in text
        text.encode()  # no lone surrogates
    path.unlink()


@pytest.mark.parametrize("suffix", PLAIN)
@fuzz(50)
@given(data=st.data())
def test_text(tmp_path, suffix, data):
    check(data.draw(damaged(PLAIN[suffix]) | st.binary(max_size=80)), suffix, tmp_path)


@pytest.mark.parametrize("suffix", PARSED)
@fuzz(6)  # each is parsed in a process of its own
@given(data=st.data())
def test_parsed(tmp_path, suffix, data):
    check(data.draw(damaged(PARSED[suffix])), suffix, tmp_path)
