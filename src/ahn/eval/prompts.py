"""From an example to token ids, and where among them the evidence is."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ahn.dialogue import Dialogue, plain, readable

if TYPE_CHECKING:
    from ahn.eval.tasks.base import Example


@dataclass(frozen=True)
class Prompt:
    """`ids`, 4 bytes each, and the evidence: tokens `evidence[0]` to `evidence[1]` - 1 of them, None where it is not
    known."""

    ids: array[int]
    evidence: tuple[int, int] | None

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
    ids = [id for part in encoded for id in part.input_ids]
    evidence = None
    if example.evidence is not None and tokenizer.is_fast:
        start, end = (place + shift for place in example.evidence)
        places = accumulate(map(len, pieces[:-1]), initial=0)
        spans = [(a + at, b + at) for part, at in zip(encoded, places, strict=True) for a, b in part.offset_mapping]
        inside = [i for i, (a, b) in enumerate(spans) if a < end and b > start and b > a]
        evidence = (inside[0], inside[-1] + 1) if inside else None
    return Prompt(array("i", ids), evidence)
