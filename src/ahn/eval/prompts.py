"""From an example to token ids, and where among them the evidence is."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

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


def encode(tokenizer: Any, example: Example) -> Prompt:
    """The prompt as the model reads it: in the tokenizer's chat template if the benchmark asks for one and there is
    one, followed by the prefix of the answer."""
    text, shift = example.prompt, 0
    chat = example.chat and getattr(tokenizer, "chat_template", None)
    if chat:
        messages = [{"role": "user", "content": example.prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        core = example.prompt.strip()  # many templates trim what they wrap
        shift = text.find(core) - example.prompt.find(core)
    text += example.answer_prefix
    options = {"add_special_tokens": not chat, "return_offsets_mapping": tokenizer.is_fast, "verbose": False}
    encoded = tokenizer(text, **options)
    evidence = None
    if example.evidence is not None and tokenizer.is_fast:
        start, end = (place + shift for place in example.evidence)
        inside = [i for i, (a, b) in enumerate(encoded.offset_mapping) if a < end and b > start and b > a]
        evidence = (inside[0], inside[-1] + 1) if inside else None
    return Prompt(array("i", encoded.input_ids), evidence)
