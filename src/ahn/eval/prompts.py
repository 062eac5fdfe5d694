"""From an example to token ids, and where among them the evidence is."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ahn.dialogue import Dialogue, plain, readable

if TYPE_CHECKING:
    from ahn.eval.tasks.base import Example, Span


@dataclass(frozen=True)
class Prompt:
    """`ids`, 4 bytes each, and the evidence: tokens `evidence[0]` to `evidence[1]` - 1 of them, None where it is not
    known.

    The text is tokens `begins` to `asks` - 1; in front of it stands the template, behind it the question. `asks` is
    None where that is not known. `needs` as in `Example`, in tokens.
    """

    ids: array[int]
    evidence: tuple[int, int] | None
    begins: int = 0
    asks: int | None = None
    needs: tuple[tuple[tuple[int, int], ...], ...] = ()

    @property
    def text(self) -> array[int]:
        """Everything in front of the question."""
        return self.ids[: self.asks]

    @cached_property
    def digest(self) -> str:
        """Identifies the ids, so that no answer is taken for that of another prompt."""
        return hashlib.sha256(str(self.ids.tolist()).encode()).hexdigest()[:12]


def exact_tokens(evidence: tuple[int, int], tokens: int, window: int, sinks: int) -> int:
    """How many tokens of the evidence are sinks or in the window when the answer begins: when the last of the
    prompt's `tokens`, which is the newest in the window, is the query."""
    return sum(at < sinks or at >= tokens - window for at in range(*evidence))


def encode(tokenizer: Any, example: Example, dialogue: Dialogue | None = None) -> Prompt:
    """The prompt as the model reads it: in the tokenizer's chat template if the benchmark asks for one and there is
    one, followed by the prefix of the answer. Special tokens in it are only text.

    Args:
        dialogue: of the tokenizer, for many prompts.
    """
    options: dict[str, Any] = {"return_offsets_mapping": tokenizer.is_fast}
    dialogue = dialogue or Dialogue(tokenizer)
    prompt, shift = readable(example.prompt), 0
    if example.chat and dialogue.has_template:
        pieces = dialogue.render([{"role": "user", "content": prompt}], ask=True)
        core = prompt.strip()  # many templates trim what they wrap
        shift = "".join(pieces).find(core) - prompt.find(core)
        pieces[-1] += example.answer_prefix
        encoded = [tokenizer(piece, add_special_tokens=False, verbose=False, **options) for piece in pieces]
    else:
        pieces = [prompt + example.answer_prefix]
        encoded = [plain(tokenizer, pieces[0], special=True, **options)]
    ids = array("i", [id for part in encoded for id in part.input_ids])
    if not tokenizer.is_fast:
        return Prompt(ids, None)
    shifts = list(accumulate(map(len, pieces[:-1]), initial=0))
    starts, ends = (
        [place[side] + at for part, at in zip(encoded, shifts, strict=True) for place in part.offset_mapping]
        for side in (0, 1)
    )

    def tokens(span: Span) -> tuple[int, int] | None:
        """The tokens that have characters of a span of the prompt."""
        first, last = bisect_right(ends, span[0] + shift), bisect_left(starts, span[1] + shift)
        return (first, last) if first < last else None

    evidence = example.evidence and tokens(example.evidence)
    if example.asks is None:
        return Prompt(ids, evidence)
    needs = tuple(tuple(place for span in one if (place := tokens(span))) for one in example.needs)
    return Prompt(ids, evidence, bisect_right(ends, shift), bisect_left(starts, example.asks + shift), needs)
