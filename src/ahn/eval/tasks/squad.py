"""SQuAD in context: the paragraph that answers, at a chosen depth among others."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ahn.dialogue import LABEL, SEPARATOR
from ahn.errors import EvalError
from ahn.eval.articles import shuffled_paragraphs, squad
from ahn.eval.metrics import normalize
from ahn.eval.places import places
from ahn.eval.tasks.base import Example, Task, template_tokens, tokens

DEFAULT_LENGTH = 8192
INSTRUCTION = "Give a short answer (1 to 5 words)."
SPREAD = 21  # depths of `spread`, from 0 to 1
ANSWER_TOKENS = 32
COMMON = 0.9  # share of the paragraphs that must not contain a question's answer


class Squad(Task):
    """`squad/30` has the evidence behind 30% of the other paragraphs; `squad/spread` goes through all depths in turn.

    A context is written as `ahn ask` writes a document and its question. Prompt, chat template and the room for the
    answer together have at most `length` tokens (None: 8,192), and few less. There is one question a paragraph. Other
    paragraphs in which its answer occurs are left out of the context.
    """

    suite = "squad"
    sets = ("spread", "0", "25", "50", "75", "100")

    def __init__(self, set: str) -> None:
        if set.isdecimal() and int(set) <= 100:
            self.set, self.name = set, f"{self.suite}/{set}"
        else:
            super().__init__(set)

    @property
    def metric(self) -> str:
        return "f1"

    def examples(
        self, *, tokenizer: Any, length: int | None, data: Path | None, seed: int, limit: int | None
    ) -> Iterator[Example]:
        length = length or DEFAULT_LENGTH
        paragraphs, texts, sizes = shuffled_paragraphs(squad(data, self.name), tokenizer, seed)
        between = tokens(tokenizer, SEPARATOR)
        fixed = template_tokens(tokenizer) + ANSWER_TOKENS
        order = [i for i, paragraph in enumerate(paragraphs) if paragraph["qas"]]
        self.random(seed, "order").shuffle(order)
        plain = [f" {normalize(text)} " for text in texts]
        given = 0
        for at in order:
            if given == limit:
                return
            qa = self.random(seed, texts[at]).choice(paragraphs[at]["qas"])
            said = [f" {normalize(answer)} " for answer in qa["answers"]]
            others = [i for i, text in enumerate(plain) if i != at and not any(answer in text for answer in said)]
            if len(others) < COMMON * (len(texts) - 1):
                continue
            question = f"{SEPARATOR}{LABEL}{qa['question'].strip()} {INSTRUCTION}"
            room = length - fixed - tokens(tokenizer, question) - sizes[at]
            if room < 0:
                raise EvalError(f"{self.name}: length {length}: expected at least {length - room} for {question!r}")
            chosen: list[int] = []
            for i in sorted(others, key=lambda i: (i < at, i)):  # first those behind it, then those from the beginning
                room -= sizes[i] + between
                if room < 0:
                    break
                chosen.append(i)
            depth = given % SPREAD / (SPREAD - 1) if self.set == "spread" else int(self.set) / 100
            while True:
                head, tail = self._around(texts, sizes, chosen, depth)
                prompt = head + texts[at] + tail + question
                if fixed + tokens(tokenizer, prompt) <= length or not chosen:
                    break
                chosen.pop()
            given += 1
            yield Example(
                id=f"{at}",
                prompt=prompt,
                answers=tuple(qa["answers"]),
                chat=True,
                max_new_tokens=ANSWER_TOKENS,
                evidence=(len(head), len(head + texts[at])),
                depth=depth,
                asks=len(prompt) - len(question) + len(SEPARATOR),
                question=qa["question"].strip(),
                needs=places(texts[at], qa["answers"], len(head)),
            )

    def random(self, seed: int, *more: object) -> random.Random:
        """Random numbers that are the same for every depth, so that the same questions are asked."""
        return random.Random("/".join(map(str, (self.suite, seed, *more))))

    @staticmethod
    def _around(texts: list[str], sizes: list[int], chosen: list[int], depth: float) -> tuple[str, str]:
        """The paragraphs in front of the evidence, as many as put it at `depth`, and those behind it."""
        total, before, place = sum(sizes[i] for i in chosen), 0, 0
        while place < len(chosen) and before + sizes[chosen[place]] / 2 <= depth * total:
            before += sizes[chosen[place]]
            place += 1
        head = "".join(texts[i] + SEPARATOR for i in chosen[:place])
        return head, "".join(SEPARATOR + texts[i] for i in chosen[place:])
