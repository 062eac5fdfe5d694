from pathlib import Path

import pytest

from ahn.documents import read_document
from ahn.documents.html import HTML, decode, html_text
from ahn.errors import DocumentError


@pytest.mark.parametrize(
    ("html", "text"),
    [
        (
            "<body><noscript><img><noscript><img></noscript><h1>Harbour</h1><p>Boats.",
            "Harbour\n\nBoats.",
        ),
        ("<head><noscript><p>x</noscript><title>T</title></head><p>a", "T\n\na"),
        (
            "<p>a<div hidden>b</div><div style='color: red; display:none'>c</div><p style='visibility: hidden'>d</p>e",
            "a\n\ne",
        ),
        ("<p>a<dialog>b</dialog><template>c</template><svg><title>d</title></svg><iframe>e</iframe>", "a"),
        ("<p hidden>a<p>b", "b"),
        ("<pre hidden>a</pre><p>b  c", "b c"),
        ("<script>'</p>'</script ><p>a", "a"),
        ("<style><!-- </style><p>a", "a"),
        ("<p>one<p>two<br>three<br><br>four", "one\n\ntwo\nthree\n\nfour"),
        ("a <b>b</b>c<i> d </i> e\n\n\tf", "a bc d e f"),
        ("<p>soft&shy;ly &#xe000; &#xfb01;&#x0;", "softly \ufffd fi\ufffd"),
        ("<ul><li>a<ul><li>b</ul><li>c</ul>d", "a\nb\nc\n\nd"),
        ("<pre>a\n  b\n\n\tc</pre>d", "a\n  b\n\n\tc\n\nd"),
        ("<p>a &lt;noscript&gt; b", "a <noscript> b"),
        ("<p>1 < 2 & 3 > 2", "1 < 2 & 3 > 2"),
        ("<ruby>漢<rp>(</rp><rt>kan</rt><rp>)</rp></ruby>", "漢(kan)"),
    ],
)
def test_as_a_browser_shows_it(html: str, text: str) -> None:
    assert html_text(html, "a.html") == text + "\n"


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<table><tr><th>Name<th>Age<tr><td>Al<td>3</table>", "Name | Age\nAl | 3"),
        ("<table><tr><td>a<td><td>c<tr><td><td>b</table>", "a | | c\n| b"),
        ("<table><tr><td><p>a</p><p>b<br>c</p><td><ul><li>d<li>e</ul></table>f", "a b c | d e\n\nf"),
        ("<table><thead><tr><td>a</thead><tbody><tr><td>b<td>c</tbody></table>", "a\nb | c"),
        (
            "<table><tr><td><h2>Menu</h2>home<td>page<table><tr><td>1<td>2<tr><td>3<td>4</table></table>",
            "Menu\n\nhome\n\npage\n\n1 | 2\n3 | 4",
        ),
    ],
)
def test_rows_of_tables_stay_rows(html: str, text: str) -> None:
    assert html_text(html, "a.html") == text + "\n"


@pytest.mark.parametrize(
    "name",
    [
        "punycode",
        "klingon",
        "idna",
        "utf-7",
        "unicode_escape",
        "hex",
        "rot13",
        "undefined",
        "mbcs",
        "utf-16",
        "\xff",
        "utf-8",
    ],
)
def test_a_declared_encoding_that_is_none_is_passed_over(name: str) -> None:
    page = f"<meta charset='{name}'><p>naïve café".encode()
    assert html_text(decode(page), "a.html") == "naïve café\n"


@pytest.mark.parametrize(
    "encoding", ["iso-8859-1", "windows-1252", "shift_jis", "gbk", "koi8-r", "windows-1251", "utf-8"]
)
def test_declared_encodings(encoding: str) -> None:
    text = {"shift_jis": "彼は朝", "gbk": "他清晨", "koi8-r": "он", "windows-1251": "он"}.get(encoding, "café")
    for head in (f"<meta charset={encoding}>", f"<meta http-equiv=x content='text/html; charset={encoding}'>"):
        assert html_text(decode(f"{head}<p>{text}".encode(encoding)), "a.html") == text + "\n"


def test_undecodable_bytes_and_long_references() -> None:
    assert html_text(decode(b"<meta charset=utf-8><p>\xff \xed\xa0\x80a"), "a.html") == "\ufffd \ufffd\ufffd\ufffda\n"
    assert html_text(f"<p>a &#{'1' * 5000}; &#xd800; b", "a.html") == "a \ufffd \ufffd b\n"


def test_deep_nesting() -> None:
    for tag in ("b", "blockquote", "span"):
        assert html_text(f"<{tag}>" * 5000 + "deep", "a.html") == "deep\n"
    assert html_text("<p><li>" * 30_000 + "flat", "a.html").endswith("flat\n")
    assert html_text("<table><tr><td>" * 5000 + "deep", "a.html") == "deep\n"
    assert html_text(f"<pre>a{' ' * 1_000_000}b</pre>", "a.html").startswith("a ")
    with pytest.raises(DocumentError, match="a.html: more than 10,000 <div> in each other; expected at most 10,000"):
        html_text("<div>" * 100_000 + "deep", "a.html")


def test_too_large(tmp_path: Path) -> None:
    path = tmp_path / "a.html"
    with path.open("wb") as file:
        file.write(b"<html>")
        file.truncate(100 * 2**20)
    with pytest.raises(DocumentError, match=f"a.html: HTML of more than {HTML.max_bytes:,} bytes"):
        read_document(path)
