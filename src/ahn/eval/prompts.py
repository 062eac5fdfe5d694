"""From an example to token ids, and where among them the evidence is."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from ahn.dialogue import LABEL, SEPARATOR, Dialogue, plain, readable

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
        return hashlib.sha256(self.ids.tobytes()).hexdigest()[:12]


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
    if example.chat and example.asks is not None and example.prompt[example.asks :].startswith(LABEL):
        return _on_a_document(dialogue, example)
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
    evidence = None
    if example.evidence is not None and tokenizer.is_fast:
        start, end = (place + shift for place in example.evidence)
        places = accumulate(map(len, pieces[:-1]), initial=0)
        spans = [(a + at, b + at) for part, at in zip(encoded, places, strict=True) for a, b in part.offset_mapping]
        inside = [i for i, (a, b) in enumerate(spans) if a < end and b > start and b > a]
        evidence = (inside[0], inside[-1] + 1) if inside else None
    return Prompt(ids, evidence)


def _on_a_document(dialogue: Dialogue, example: Example) -> Prompt:
    """A document and a question about it, as `Dialogue` has them. Questions on one document encode it once."""
    assert example.asks is not None
    document, asked = example.prompt[: example.asks].removesuffix(SEPARATOR), example.prompt[example.asks :]
    ids, starts = _opened(dialogue, readable(document))
    question = dialogue.question(readable(asked).removeprefix(LABEL))[0].tolist()

    def tokens(span: Span) -> tuple[int, int]:
        """The tokens that have characters of a span of the prompt."""
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
    """Ids of an open document, and the character that each begins at; below 0 for those of the template."""
    blocks = list(dialogue.stream([document]))
    starts = np.maximum.accumulate(np.concatenate([block.starts for block in blocks]))
    return array("i", np.concatenate([block.ids for block in blocks]).tolist()), starts
