"""What `ahn inspect` shows: the words a store keeps, in their context, as text for a terminal or as an HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
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
header, figcaption, .gap {{ font: .82rem/1.5 system-ui, sans-serif; color: var(--dim) }}
figure {{ margin: 1.6rem 0 2.2rem }}
svg {{ width: 100%; height: auto; display: block; border: 1px solid var(--line); border-radius: 4px }}
rect {{ fill: rgb(var(--hot)) }}
.text {{ white-space: pre-wrap; overflow-wrap: anywhere; color: var(--dim) }}
.text b {{ font-weight: normal; color: var(--ink); border-radius: 2px; padding: .08em 0;
  background: rgba(var(--hot), calc(var(--k) * .75)) }}
.gap {{ display: block; text-align: center; margin: .9rem 0; white-space: normal }}
.gap::before, .gap::after {{ content: ""; display: inline-block; width: 22%; margin: 0 .8em;
  border-top: 1px solid var(--line); vertical-align: middle }}
</style>
<header><h1>{title}</h1>{facts}</header>
<figure>{map}<figcaption>{caption}</figcaption></figure>
<div class="text">{text}</div>
</html>
"""


@dataclass
class Piece:
    """A token, and how many heads keep it; or a gap of so many tokens, whose `text` is None."""

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
        # as it reads behind what is before it: some tokens are parts of a letter, some hide a space at the start
        whole, head = (tokenizer.decode(part).strip("\ufffd") if part else "" for part in (run, run[:-1]))
        found.append(Piece(whole[len(head) :] if whole.startswith(head) else "", heads.get(at, 0), at))
        before = at
    return found


def terminal(shown: list[Piece], total: int, colour: bool) -> Any:
    """A rich Text; without colour, what is kept stands in ⟦ ⟧."""
    from rich.text import Text

    text, inside = Text(), False
    for piece in shown:
        kept = piece.text is not None and piece.heads > 0
        if not colour and kept != inside:
            text.append("⟦" if kept else "⟧")
        inside = kept
        if piece.text is None:
            text.append(f"\n   ⋯ {piece.tokens:,} tokens ⋯\n", style="dim")
        elif not kept:
            text.append(piece.text, style="dim")
        else:
            shade = SHADES[min(len(SHADES) - 1, piece.heads * len(SHADES) // (total + 1))]
            text.append(piece.text, style=f"bold {shade}" if colour else "")
    return text.append("⟧") if inside and not colour else text


def legend(total: int) -> Any:
    from rich.text import Text

    text, step = Text("kept by "), -(-total // len(SHADES))
    for i, shade in enumerate(SHADES):
        text.append(f" {i * step + 1}–{min((i + 1) * step, total)} ", style=f"bold {shade}")
    return text.append(f"of {total} heads")


def page(title: str, facts: list[str], shown: list[Piece], layers: list[list[int]], length: int, total: int) -> str:
    """A whole HTML page.

    Args:
        layers: by layer, the positions that its heads keep, each as often as it is kept. length: tokens of the text.
    """
    return PAGE.format(
        title=escape(title),
        facts="<br>".join(map(escape, facts)),
        map=_map(layers, length),
        caption="Where in the text each layer keeps tokens: the first layer on top, the start of the text on the left.",
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
