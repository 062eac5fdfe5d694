"""The words that a store keeps, in their context, as text for a terminal or as an HTML page (`ahn inspect`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

BINS = 160  # columns of the map
SHADES = ("#8a8a8a", "#c8a24a", "#e8a020", "#f07818", "#f03c28")  # from one head to all of them
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ --ink: #222; --dim: #8c8c8c; --paper: #fdfcf9; --line: #e4e0d6; --hot: 226, 78, 27 }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e8e4da; --dim: #7d7a73; --paper: #171614; --line: #35322c; --hot: 255, 122, 48 }} }}
body {{ margin: 0 auto; max-width: 46rem; padding: 2.5rem 1.25rem 6rem; color: var(--ink); background: var(--paper);
  font: 1.06rem/1.75 Georgia, "Times New Roman", serif }}
h1 {{ font-size: 1.5rem; margin: 0 0 .2rem }}
header, .axis, figcaption, .gap {{ font: .82rem/1.5 system-ui, sans-serif; color: var(--dim) }}
figure {{ margin: 1.6rem 0 2.2rem; display: grid; grid-template-columns: auto 1fr; gap: .3rem .6rem }}
figcaption {{ grid-column: 2 }}
.axis {{ display: flex; justify-content: space-between }}
.side {{ flex-direction: column; text-align: right }}
svg {{ width: 100%; height: auto; display: block; border: 1px solid var(--line); border-radius: 4px }}
rect {{ fill: rgb(var(--hot)) }}
.text {{ white-space: pre-wrap; overflow-wrap: anywhere; color: var(--dim) }}
b {{ font-weight: normal; color: var(--ink); border-radius: 2px; padding: .08em 0;
  background: rgba(var(--hot), calc(var(--k) * .75)) }}
.key b {{ padding: .08em .5em }}
.gap {{ display: block; text-align: center; margin: .9rem 0; white-space: normal }}
.gap::before, .gap::after {{ content: ""; display: inline-block; width: 22%; margin: 0 .8em;
  border-top: 1px solid var(--line); vertical-align: middle }}
</style>
<header><h1>{title}</h1>{facts}<br><span class="key">kept by {key} of {total} heads</span></header>
<figure><div class="axis side">{sides}</div>{map}
<figcaption><div class="axis"><span>token 0</span><span>token {last:,}</span></div>{caption}</figcaption></figure>
<div class="text">{text}</div>
</html>
"""


@dataclass
class Piece:
    """A token and the number of heads that keep it, or a gap: its `text` is None, and `tokens` is its length."""

    text: str | None
    heads: int
    position: int
    tokens: int = 1


def pieces(tokenizer: Any, positions: list[int], ids: list[int], heads: dict[int, int], beside: int) -> list[Piece]:
    """The tokens that are kept, those within `beside` of one, and the gaps between, in order.

    Args:
        positions, ids: of all tokens whose words are known, ascending. heads: by position, how many keep it.
    """
    known = dict(zip(positions, ids, strict=True))
    shown = sorted({at + d for at in heads for d in range(-beside, beside + 1)} & known.keys())
    found: list[Piece] = []
    run: list[int] = []
    before = -1
    for at in shown:
        if at != before + 1:
            run = []
            if at > before + 1:
                found.append(Piece(None, 0, before + 1, at - before - 1))
        run = [*run[-7:], known[at]]
        # decoded together with the tokens before it: some tokens are parts of a letter, some hide a space at the start
        whole, head = (tokenizer.decode(part).strip("\ufffd") if part else "" for part in (run, run[:-1]))
        found.append(Piece(whole[len(head) :] if whole.startswith(head) else "", heads.get(at, 0), at))
        before = at
    return found


def passages(shown: list[Piece]) -> list[list[Piece]]:
    """The runs of tokens between gaps. Those whose tokens most heads keep come first."""
    whole = [list(run) for gap, run in groupby(shown, lambda piece: piece.text is None) if not gap]
    return sorted(whole, key=lambda run: -_best(run).heads)


def terminal(passage: list[Piece], total: int) -> Any:
    """A line as a rich Text: the most heads that keep one token, its position, and the words, kept ones in ⟦ ⟧."""
    from rich.text import Text

    best = _best(passage)
    text = Text(f"{best.heads:>5,} {best.position:>9,}   ")
    for heads, run in groupby(passage, lambda piece: piece.heads):
        words = re.sub(r"\s*\n\s*", "↵", "".join(piece.text or "" for piece in run))
        if not heads:
            text.append(words, style="dim")
        elif words:
            shade = SHADES[min(len(SHADES) - 1, heads * len(SHADES) // (total + 1))]
            text.append(" " * (len(words) - len(words.lstrip())))
            text.append(f"⟦{words.lstrip()}⟧", style=f"bold {shade}")
    return text


def _best(passage: list[Piece]) -> Piece:
    return max(passage, key=lambda piece: piece.heads)


def page(
    title: str, facts: list[str], shown: list[Piece], layers: dict[int, list[int]], length: int, total: int
) -> str:
    """A whole HTML page.

    Args:
        layers: by layer, the positions that its heads keep, each as often as it is kept. length: tokens of the text.
    """
    some = dict.fromkeys(max(1, round(total * i / 4)) for i in range(5))
    return PAGE.format(
        title=escape(title),
        facts="<br>".join(map(escape, facts)),
        key=" ".join(f'<b style="--k:{heads / total:.2f}">{heads:,}</b>' for heads in some),
        total=f"{total:,}",
        sides="".join(f"<span>layer {layer}</span>" for layer in dict.fromkeys([min(layers), max(layers)])),
        map=_map(list(layers.values()), length),
        last=length - 1,
        caption="Where in the text each layer keeps tokens: the more, the darker.",
        text="".join(_html(shown, total)),
    )


def _html(shown: list[Piece], total: int) -> Iterator[str]:
    for piece in shown:
        if piece.text is None:
            yield f'<span class="gap">{piece.tokens:,} tokens</span>'
        elif not piece.heads:
            yield escape(piece.text)
        else:
            said = f"token {piece.position:,}: {piece.heads} of {total} heads"
            yield f'<b style="--k:{piece.heads / total:.2f}" title="{said}">{escape(piece.text)}</b>'


def _map(layers: list[list[int]], length: int) -> str:
    bars = []
    for row, positions in enumerate(layers):
        counts = [0] * BINS
        for at in positions:
            counts[min(BINS - 1, at * BINS // length)] += 1
        most = max(max(counts), 1)
        bars += [
            f'<rect x="{i}" y="{row * 3}" width="1" height="3" opacity="{count / most:.2f}"/>'
            for i, count in enumerate(counts)
            if count
        ]
    height = 3 * max(len(layers), 1)
    return f'<svg viewBox="0 0 {BINS} {height}" preserveAspectRatio="none" role="img">{"".join(bars)}</svg>'
