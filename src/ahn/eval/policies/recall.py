"""Passages of the text, found for each question and read again in front of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ahn.dialogue import SEPARATOR, Dialogue
from ahn.errors import ConfigError
from ahn.eval.kept import Kept, digest, exact_part, memory_with_store, trained
from ahn.eval.policies.base import Policy
from ahn.hf.augment import augment
from ahn.hf.weights import apply
from ahn.memory.cache import AHNCache
from ahn.recall import finders, support
from ahn.recall.ask import as_text, best, rank, sources
from ahn.recall.passages import Passages
from ahn.recall.question import Question
from ahn.recall.words import words

if TYPE_CHECKING:
    from ahn.eval.prompts import Prompt
    from ahn.eval.tasks.base import Example

BUDGETS = (256, 512, 1024)  # tokens of passages; the share of evidence among them is noted for each


class Recall(Policy):
    """Sinks, window and any memory of an adapter; questions are answered from passages, as `ahn.ask` does.

    `--recall`, `--finder` and `--rounds` say how passages are found and how many tokens of them are read again.
    Prompts that ask nothing about a text are answered from the memory.
    """

    name = "recall"
    uses_store = True
    recalls = True
    finds = True

    @classmethod
    def check(cls, base: Any, longest: int, kept: Kept) -> None:
        super().check(base, longest, kept)
        finders.check_name(kept.recall.finder)
        if not kept.recall.tokens or kept.recall.tokens < 1:
            raise ConfigError(f"recall={kept.recall.tokens}: expected at least 1 token to read again")

    @classmethod
    def settings(cls, kept: Kept) -> dict[str, Any]:
        found = super().settings(kept) | {"recall": kept.recall._asdict() | {"context": "passages"}}
        if kept.adapter is None:
            return found
        found |= {"cell": trained(kept.adapter).config.cell, "adapter_digest": digest(kept.adapter)}
        return found if kept.store is None else found | {"store": kept.store._asdict()}

    def prepare(self) -> None:
        if self.kept.adapter is None:
            augment(self.model, exact_part(self.kept))
            return
        augment(self.model, memory_with_store(self.kept))
        apply(trained(self.kept.adapter), self.model)
        self.model.eval()

    def text_cache(self) -> Any:
        return AHNCache(self.model, "text" if self.model.ahn_retrieval is None else "keys")

    @property
    def parameters_added(self) -> int:
        return sum(p.numel() for name, p in self.model.named_parameters() if ".ahn." in name)

    def asked(self, questions: Sequence[tuple[Prompt, Example]]) -> list[tuple[list[int], dict[str, Any]]]:
        memory, dialogue = self.document(questions[0][0]), Dialogue.of(self.tokenizer)
        rows, checks, notes = [], [], []
        for prompt, example in questions:
            passages, taken, note = self.found(memory, prompt, example)
            text = as_text(sources(passages, taken))
            front = [*prompt.ids[: prompt.begins], *self._ids(text and text + SEPARATOR)]
            rows.append([*front, *prompt.ids[prompt.asks :]])
            checks.append([*front, *dialogue.question(support.check(example.question))[0].tolist()])
            notes.append(note)
        said = support.said(self.tokenizer, self.logits_after(AHNCache(self.model), checks))
        for note, more in zip(notes, said, strict=True):
            note["support"] |= more
        limits = [example.max_new_tokens for _, example in questions]
        return list(zip(self.after(AHNCache(self.model), rows, limits), notes, strict=True))

    def found(self, memory: Any, prompt: Prompt, example: Example) -> tuple[Passages, list[int], dict[str, Any]]:
        """All passages, the ones that are read again for a question, and entries for its row: the share of its evidence
        among them, and the signals of support."""
        passages = Passages.of(memory.archive, self.tokenizer)
        question = Question(example.question, self.model, self.tokenizer, memory)
        scores = self.scores(passages, question, prompt, example)
        allowed = passages.bounds[1:] > prompt.begins  # instructions are no passage
        scores = np.where(allowed, scores, -np.inf)
        by_budget = {str(n): evidence(passages, best(scores, passages.lengths, n), prompt) for n in BUDGETS}
        if self.kept.recall.rounds == 1:
            taken = best(scores, passages.lengths, self.kept.recall.tokens or 0)
        else:
            taken = rank(passages, question, self.kept.recall, allowed)
        note: dict[str, Any] = {
            "recalled": int(passages.lengths[taken].sum()),
            "overlap": overlap(passages, prompt, example),
            "support": support.of_passages(passages, taken, question),
        }
        if prompt.needs:
            note |= {"found": evidence(passages, taken, prompt), "found_by_budget": by_budget}
        return passages, taken, note

    def scores(self, passages: Passages, question: Question, prompt: Prompt, example: Example) -> np.ndarray:
        """A score for each passage."""
        return finders.get(self.kept.recall.finder)().scores(passages, question)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids if text else []


def evidence(passages: Passages, taken: Sequence[int], prompt: Prompt) -> float:
    """The share of the needed facts that have a place in the passages taken."""
    read = [(int(passages.bounds[i]), int(passages.bounds[i + 1])) for i in taken]
    there = [
        any(low <= start < high or start < low < end for start, end in one for low, high in read)
        for one in prompt.needs
    ]
    return sum(there) / len(there) if there else 0.0


def overlap(passages: Passages, prompt: Prompt, example: Example) -> float | None:
    """The share of the question's words that occur in a passage with evidence."""
    starts = [start for one in prompt.needs for start, _ in one]
    where = {int(np.searchsorted(passages.bounds, start, side="right")) - 1 for start in starts}
    known = {word for i in where if 0 <= i < len(passages) for word in words(passages.texts[i])}
    asked = set(words(example.question))
    return len(asked & known) / len(asked) if asked and known else None
