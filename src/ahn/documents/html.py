"""HTML as a browser shows it: selectolax parses as browsers do, and the text keeps paragraphs, lines and table rows."""

from __future__ import annotations

import codecs
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

from ahn.documents.base import Format, Piece, clean
from ahn.documents.encoding import guess, marked, wide
from ahn.errors import DocumentError

MAX_NESTING = 10_000  # levels of elements of one kind; the parser's time grows with the square


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


_HIDDEN = _names(
    "annotation annotation-xml area audio base canvas datalist embed head iframe link meta noembed noframes object "
    "param script style svg template video"
)
_PARAGRAPH = _names(
    "article aside blockquote center dir dl fieldset figure footer form h1 h2 h3 h4 h5 h6 header hr main menu nav ol "
    "p pre section table ul"
)
_LINE = _names(
    "address body caption dd details dialog div dt figcaption hgroup html legend li optgroup option search select "
    "summary tbody textarea tfoot thead title tr"
)
# Elements that close themselves or have no end
_FLAT = _names("area base br col dd dt embed hr img input li link meta option p param source tbody td th tr wbr")
_LAYOUT = "table, h1, h2, h3, h4, h5, h6, pre, blockquote, article, section, main, form"
_STYLED_AWAY = re.compile(r"(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*(?:hidden|collapse))", re.IGNORECASE)
_SPACE = re.compile(r"[ \t\n\r\f\u00a0]+")
_START = re.compile(
    rb"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html[\s>])", re.IGNORECASE | re.DOTALL
)
_DECLARED = re.compile(
    rb"<meta[^>]+charset\s*=\s*[\"']?\s*([\w.:-]+)|<\?xml[^>]+encoding\s*=\s*[\"']([\w.:-]+)", re.IGNORECASE
)
_TAG = re.compile(r"<(/?)([a-zA-Z][^\s/>]*)")
_NOSCRIPT = re.compile(r"<(/?)noscript(?=[\s/>])", re.IGNORECASE)
_SELF_CLOSED = re.compile(r"<(title|script|style|textarea|iframe|noscript)\b([^<>]*)/>", re.IGNORECASE)
# What Python calls the encodings that browsers know
_KNOWN = re.compile(
    r"utf-8|utf-16(-le|-be)?|cp125\d|cp874|cp866|cp932|cp949|iso8859-\d+|koi8-[ru]|mac-(roman|cyrillic)|gb18030|gbk|gb2312|"
    r"big5(hkscs)?|euc_(jp|kr)|shift_jis|iso2022_jp"
)


class HTML(Format):
    name = "html"
    title = "HTML"
    suffixes = (".html", ".htm", ".xhtml", ".xht")
    max_bytes = 32 * 2**20

    def marks(self, head: bytes) -> bool:
        start = head[:4096].replace(b"\0", b"").lstrip(codecs.BOM_UTF8 + codecs.BOM_UTF16)
        return bool(_START.match(start))

    def read(self, file: BinaryIO, name: str) -> Iterator[Piece]:
        yield Piece(html_text(decode(file.read()), name))


def decode(data: bytes) -> str:
    """`data` in the encoding of its mark, of its declaration, or in the likeliest. As in browsers, a declaration that
    names no encoding is passed over, and undecodable bytes are U+FFFD."""
    encoding = marked(data) or wide(data) or _declared(data[:1024]) or guess(data)
    return data.decode(encoding, "replace")


def _declared(head: bytes) -> str | None:
    found = _DECLARED.search(head)
    if not found:
        return None
    try:
        encoding = codecs.lookup((found[1] or found[2]).decode("ascii")).name
    except (LookupError, UnicodeDecodeError):
        return None
    if encoding in ("ascii", "iso8859-1"):  # as browsers do
        return "cp1252"
    if encoding.startswith("utf-16"):  # a declaration that could be read is not in UTF-16
        return "utf-8"
    return encoding if _KNOWN.fullmatch(encoding) else None


def html_text(html: str, name: str, xhtml: bool = False) -> str:
    """The visible text of a page. Blank lines separate paragraphs; a table row is one line, its cells separated by
    ` | `, unless a cell holds whole sections, as in tables made for layout.

    Args:
        name: of the document, for messages.
        xhtml: elements such as `<title/>` close themselves.

    Raises:
        DocumentError: more than 10,000 elements in each other.
    """
    from selectolax.lexbor import LexborHTMLParser

    if xhtml:
        html = _SELF_CLOSED.sub(r"<\1\2></\1>", html)
    _check_nesting(html, name)
    # Where scripts run, browsers take the inside of noscript as they do that of noframes: as text that is not shown
    tree = LexborHTMLParser(_NOSCRIPT.sub(r"<\1noframes", html))
    return _Page(tree).text()


def _check_nesting(html: str, name: str) -> None:
    depth: Counter[str] = Counter()
    for end, tag in _TAG.findall(html):
        tag = tag.lower()
        if tag in _FLAT:
            continue
        depth[tag] += -1 if end else 1
        if depth[tag] > MAX_NESTING:
            limit = f"{MAX_NESTING:,}"
            raise DocumentError(f"{name}: more than {limit} <{tag[:20]}> in each other; expected at most {limit}")


class _Page:
    """Walks through a parsed page and collects its text."""

    def __init__(self, tree: Any) -> None:
        self.parts: list[str] = []
        self.breaks = 0  # line ends due before the next text
        self.space = False  # one space due before the next text
        self.cells = 0  # of the row so far
        self.row: Any = None  # that becomes one line
        self.preformatted = 0
        self.layout = _layout_rows(tree)
        title = tree.css_first("head > title")
        if title is not None:
            self.write(title.text())
            self.breaks = 2
        self.walk(tree.root)

    def text(self) -> str:
        text = re.sub(r"(?<![ \t])[ \t]+\n", "\n", clean("".join(self.parts)))
        return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"

    def walk(self, root: Any) -> None:
        node, entered = root, []
        while node is not None:
            following = None
            if self.open(node):
                entered.append(node)
                following = node.first_child
            while following is None and node is not None:
                if entered and entered[-1] is node:
                    self.close(entered.pop())
                following = node.next
                if following is None:
                    node = entered[-1] if entered else None
            node = following

    def open(self, node: Any) -> bool:
        """Whether to visit the children of `node`; if so, `close` is called after them."""
        if node.is_text_node:
            self.write(node.text_content or "")
            return False
        tag = node.tag
        if not node.is_element_node or tag in _HIDDEN or _is_hidden(node, tag):
            return False
        if tag == "br":
            self.end_line(min(self.breaks + 1, 2))
        elif tag == "tr" and self.row is None and node.mem_id not in self.layout:
            self.end_line(1)
            self.row, self.cells = node.mem_id, 0
        elif tag in ("td", "th") and self.row is None:
            self.end_line(2)
        elif tag in ("td", "th"):
            if self.cells:
                self.space = False
                mark = "|" if self.breaks else " |"
                self.start()
                self.parts.append(mark)
                self.space = True
            self.cells += 1
        else:
            self.end_line(_breaks(tag, node.parent))
        self.preformatted += tag in ("pre", "textarea")
        return True

    def close(self, node: Any) -> None:
        tag = node.tag
        self.preformatted -= tag in ("pre", "textarea")
        if node.mem_id == self.row:
            self.row = None
        if tag != "br":
            self.end_line(_breaks(tag, node.parent))

    def end_line(self, breaks: int) -> None:
        if self.row is not None:
            self.space = self.space or breaks > 0
        else:
            self.breaks = max(self.breaks, breaks)

    def write(self, text: str) -> None:
        if self.preformatted and self.row is None:
            self.start()
            self.parts.append(text.replace("\u00a0", " "))
            return
        text = _SPACE.sub(" ", text)
        self.space = self.space or text.startswith(" ")
        if words := text.strip(" "):
            self.start()
            self.parts.append(words)
            self.space = text.endswith(" ")

    def start(self) -> None:
        if self.breaks:
            self.parts.append("\n" * self.breaks)
        elif self.space and self.parts:
            self.parts.append(" ")
        self.breaks, self.space = 0, False


def _breaks(tag: str, parent: Any) -> int:
    """Line ends before and behind an element."""
    if tag in ("ol", "ul") and parent is not None and parent.tag == "li":
        return 1
    return 2 if tag in _PARAGRAPH else int(tag in _LINE)


def _is_hidden(node: Any, tag: str) -> bool:
    if tag == "title" and node.parent is not None and node.parent.tag == "head":
        return True
    attributes = node.attributes
    if tag == "dialog" and "open" not in attributes:
        return True
    return "hidden" in attributes or bool(_STYLED_AWAY.search(attributes.get("style") or ""))


def _layout_rows(tree: Any) -> set[int]:
    """Rows with a cell that holds more than a value, by `mem_id`."""
    rows: set[int] = set()
    for node in tree.css(f"td :is({_LAYOUT}), th :is({_LAYOUT})"):
        above = node.parent
        while above is not None and above.mem_id not in rows:
            if above.tag == "tr":
                rows.add(above.mem_id)
            above = above.parent
    return rows
