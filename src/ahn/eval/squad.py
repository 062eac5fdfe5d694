"""Articles with questions (SQuAD), joined to contexts of one length, and where in them each answer is found."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ahn.dialogue import LABEL, SEPARATOR, Dialogue
from ahn.eval.tasks.articles import shuffled_paragraphs


@dataclass(frozen=True)
class Question:
    """Tokens `start` to `end` - 1 of the context are the paragraph that answers it, to within a token."""

    text: str
    answers: tuple[str, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Context:
    """`ids` [T]: a document, opened in the tokenizer's chat template; what follows is `Dialogue.question`."""

    ids: Tensor
    questions: tuple[Question, ...]

    def behind(self, sinks: int, window: int) -> list[Question]:
        """Questions whose paragraph has left the window before they are asked, and is no sink."""
        return [q for q in self.questions if sinks <= q.start and q.end <= len(self.ids) - window]

    def within(self, window: int, room: int) -> list[Question]:
        """Questions whose paragraph is still in the window `room` tokens after the context."""
        return [q for q in self.questions if q.start >= len(self.ids) + room - window]


def contexts(
    records: Iterable[dict[str, Any]], tokenizer: Any, length: int, count: int, seed: int = 0
) -> list[Context]:
    """Contexts of exactly `length` tokens, at most `count`, no paragraph in two of them.

    Articles come in random order, their paragraphs in their own. The first paragraph is cut in front, so that lengths
    are equal and contexts can be read as rows of one batch.

    Args:
        records: with `paragraphs`, each with `context` and `qas` (`question`, `answers`).
        tokenizer: a fast one.
    """
    paragraphs, texts, sizes = shuffled_paragraphs(records, tokenizer, seed)
    dialogue = Dialogue(tokenizer)
    found: list[Context] = []
    first = tokens = 0
    for last, size in enumerate(sizes, 1):
        tokens += size
        if tokens >= length and len(found) < count:
            found.append(_context(dialogue, texts[first:last], paragraphs[first:last], length))
            first, tokens = last, 0
    return found


def _context(dialogue: Dialogue, texts: list[str], paragraphs: list[dict[str, Any]], length: int) -> Context:
    document = SEPARATOR.join(texts)
    ids = dialogue.open(document)[0]
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    offsets = dialogue.tokenizer(document + SEPARATOR + LABEL, **options).offset_mapping
    ends = [end for _, end in offsets if end <= len(document + SEPARATOR)]
    prefix, cut = len(ids) - len(ends), len(ids) - length
    asked: list[Question] = []
    place = 0
    for text, paragraph in zip(texts, paragraphs, strict=True):
        first = prefix - cut + bisect_right(ends, place)
        end = prefix - cut + bisect_left(ends, place + len(text)) + 1
        if first >= prefix:
            asked += [Question(qa["question"], tuple(qa["answers"]), first, end) for qa in paragraph["qas"]]
        place += len(text + SEPARATOR)
    return Context(torch.cat([ids[:prefix], ids[prefix + cut :]]), tuple(asked))
