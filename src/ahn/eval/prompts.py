"""Turns an example into token ids, and finds the tokens of its evidence."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ahn.dialogue import LABEL, SEPARATOR, Dialogue, plain, readable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ahn.eval.places import Span
    from ahn.eval.tasks.base import Example


@dataclass(frozen=True)
class Prompt:
    """`ids`, 4 bytes each, and the evidence: tokens `evidence[0]` to `evidence[1]` - 1 of them, None where it is not
    known.

    The text is tokens `begins` to `asks` - 1; in front of it stand template and instructions, behind it the question,
    or the rest of the template. `asks` is None where nothing is asked about a text. `needs` as in `Example`, in tokens.
    """

    ids: array[int]
    evidence: tuple[int, int] | None
    begins: int = 0
    asks: int | None = None
    needs: tuple[tuple[tuple[int, int], ...], ...] = ()

    @property
    def text(self) -> array[int]:
        """The tokens in front of the question."""
        return self.ids[: self.asks]

    @cached_property
    def digest(self) -> str:
        """A digest of the ids. With it an answer to another prompt is recognised."""
        return hashlib.sha256(self.ids.tobytes()).hexdigest()[:12]


def exact_tokens(evidence: tuple[int, int], tokens: int, window: int, sinks: int) -> int:
    """The number of tokens of the evidence that are sinks or in the window when the answer begins. The query is then
    the last of the prompt's `tokens`, and it is the newest in the window."""
    return sum(at < sinks or at >= tokens - window for at in range(*evidence))


def encode(tokenizer: Any, example: Example, dialogue: Dialogue | None = None) -> Prompt:
    """The prompt as the model reads it: in the tokenizer's chat template if the benchmark asks for one and there is
    one, followed by the prefix of the answer. Special tokens in it are only text.

    Args:
        dialogue: of the tokenizer, for many prompts.
    """
    options: dict[str, Any] = {"return_offsets_mapping": tokenizer.is_fast}
    dialogue = dialogue or Dialogue(tokenizer)
    if example.asks is not None and example.apart:
        return _on_a_document(dialogue, example)
    prompt = readable(example.prompt)
    shift, end = 0, len(prompt)
    if example.chat and dialogue.has_template:
        pieces = dialogue.render([{"role": "user", "content": prompt}], ask=True)
        core = prompt.strip()  # many templates trim the text that they wrap
        shift = "".join(pieces).find(core) - prompt.find(core)
        end = prompt.find(core) + len(core)
        pieces[-1] += example.answer_prefix
        encoded = [tokenizer(piece, add_special_tokens=False, verbose=False, **options) for piece in pieces]
    else:
        pieces = [prompt + example.answer_prefix]
        encoded = [plain(tokenizer, pieces[0], special=True, **options)]
    ids = array("i", [id for part in encoded for id in part.input_ids])
    if not tokenizer.is_fast or (example.evidence is None and example.asks is None):
        return Prompt(ids, None)
    starts, ends = _characters(encoded, pieces)

    def tokens(span: Span) -> Span | None:
        """The tokens that cover a span of the prompt's characters."""
        inside = np.flatnonzero((starts < span[1] + shift) & (ends > span[0] + shift) & (ends > starts))
        return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else None

    def token(place: int) -> int:
        """The first token that reaches beyond character `place` of the prompt. If there is none, the last token, so
        that an answer always has a token to follow."""
        later = ends > min(place, end) + shift
        return int(np.argmax(later)) if later.any() else len(ids) - 1

    evidence = example.evidence and tokens(example.evidence)
    if example.asks is None or not (asks := token(example.asks)):
        return Prompt(ids, evidence)
    needs = (tuple(found for span in fact if (found := tokens(span))) for fact in example.needs)
    return Prompt(ids, evidence, token(example.begins), asks, tuple(fact for fact in needs if fact))


def _characters(encoded: Sequence[Any], pieces: Sequence[str]) -> tuple[Any, Any]:
    """First character and end of each token, counted over all pieces. Each piece is encoded by itself."""
    offsets = [np.array(part.offset_mapping, dtype=np.int64).reshape(-1, 2) for part in encoded]
    before = np.cumsum([0, *map(len, pieces)])[:-1]
    both = np.concatenate([part + at for part, at in zip(offsets, before, strict=True)])
    return both[:, 0], both[:, 1]


def _on_a_document(dialogue: Dialogue, example: Example) -> Prompt:
    """A document and a question about it, as `Dialogue` has them. Questions on one document encode it once."""
    assert example.asks is not None
    document, asked = example.prompt[: example.asks].removesuffix(SEPARATOR), example.prompt[example.asks :]
    ids, starts = _opened(dialogue, readable(document))
    question = dialogue.question(readable(asked).removeprefix(LABEL))[0].tolist()

    def tokens(span: Span) -> tuple[int, int]:
        """The tokens that cover a span of the prompt's characters."""
        return int(np.searchsorted(starts, span[0], side="right")) - 1, int(np.searchsorted(starts, span[1]))

    return Prompt(
        ids + array("i", question),
        example.evidence and tokens(example.evidence),
        int(np.searchsorted(starts, 0)),
        len(ids),
        tuple(tuple(tokens(span) for span in one) for one in example.needs),
    )


@lru_cache(maxsize=1)
def _opened(dialogue: Dialogue, document: str) -> tuple[array[int], Any]:
    """Ids of an open document, and the first character of each. It is negative for tokens of the template."""
    blocks = list(dialogue.stream([document]))
    starts = np.maximum.accumulate(np.concatenate([block.starts for block in blocks]))
    return array("i", np.concatenate([block.ids for block in blocks]).tolist()), starts
