"""RULER (arXiv 2404.06654): texts of any length with facts to find, follow, count or reason about, from a seed.

Templates, sizes and scores are the benchmark's. The word lists and essays are others, which come with this package or
are given. So scores compare models with each other, and only roughly with published ones.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ahn.errors import EvalError
from ahn.eval.places import Span
from ahn.eval.records import SUFFIXES, Record, found, read
from ahn.eval.ruler import chains, counts, needles, questions
from ahn.eval.ruler.text import Text
from ahn.eval.tasks.base import Example, Task, template_tokens, tokens

DEFAULT_LENGTH, DEFAULT_COUNT = 4096, 500
_PREFIX_STARTS = (" The special magic ", " Answer:")
_TEMPLATES = {"vt": chains.VT, "cwe": counts.CWE, "fwe": counts.FWE, "qa_1": questions.QA, "qa_2": questions.QA}
_INSTRUCTIONS = {name: template.partition("{context}")[0] for name, template in _TEMPLATES.items()}  # before the text
_ASKED = {  # between the text and the question
    "vt": "Question: ",
    "cwe": "Question: ",
    "fwe": "Question: Do not provide any explanation. Please ignore the dots '....'. ",
    "qa_1": f"{questions.ONLY}\n\nQuestion: ",
    "qa_2": f"{questions.ONLY}\n\nQuestion: ",
}
_NEW_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}


class Ruler(Task):
    """Eight needles in a haystack, variable tracking, common and frequent words, and questions among documents.

    Prompt, chat template, answer prefix and the room for the answer together have at most `length` tokens (None:
    4,096), and as many as fit. Without `limit` there are 500 examples.

    `data` is RULER's own file (`SET/validation.jsonl`: `input`, `outputs`, `answer_prefix`), which is taken as it is;
    or text, .txt or a folder of it, that becomes the essays; or for qa_1 SQuAD, for qa_2 HotpotQA, each as the
    benchmark has it or a JSON line a record. Without it the essays are the bundled stories, and QA is from the hub.
    A haystack that is too short is repeated. Sentences end at ". ", "! " or "? ".

    The facts that an answer needs are its needles, the chain's assignments, the places of the answer in qa_1's
    document, and qa_2's documents. Words to count stand everywhere, so that none are known for cwe and fwe; nor for
    the questions of RULER's own files, which do not say which documents answer.
    """

    suite = "ruler"
    sets = (*needles.SETS, *_NEW_TOKENS)
    groups: ClassVar = {"niah": tuple(needles.SETS), "qa": ("qa_1", "qa_2")}

    @property
    def metric(self) -> str:
        return "string_match_part" if self.set.startswith("qa_") else "string_match_all"

    @property
    def max_new_tokens(self) -> int:
        return _NEW_TOKENS.get(self.set, 128)

    def clean(self, prediction: str) -> str:
        return re.sub(r"[\x00-\x1f]", "\n", prediction).strip()

    def examples(
        self, *, tokenizer: Any, length: int | None, data: Path | None, seed: int, limit: int | None
    ) -> Iterator[Example]:
        ready = data and self._ready(data, length)
        if ready:
            records = list(read(ready))
            for i in self.chosen(len(records), seed, limit):
                yield self.shorten(self._given(records[i]), tokenizer, length)
            return
        length = DEFAULT_LENGTH if length is None else length
        fixed = template_tokens(tokenizer) + self.max_new_tokens
        count = DEFAULT_COUNT if limit is None else limit
        draw = self._draw(length, data, seed)

        def size(index: int, units: int) -> int:
            text = draw(index, units)
            return fixed + tokens(tokenizer, text.prompt + text.answer_prefix)

        usual = _filling(partial(size, 0), length, 16, self.name)
        for index in range(count):
            text = draw(index, _filling(partial(size, index), length, usual, self.name))
            yield Example(
                id=str(index),
                answers=text.answers,
                chat=True,
                max_new_tokens=self.max_new_tokens,
                depth=text.depth,
                answer_prefix=text.answer_prefix,
                **self._asked(text.prompt, text.facts, text.needs),
            )

    def _ready(self, data: Path, length: int | None) -> Path | None:
        """RULER's own file of this set, if `data` is that file or a folder with it."""
        names = [
            f"{self.set}/validation",
            self.set,
            f"ruler-{self.set}",
            *([f"ruler-{self.set}-{length}"] if length else []),
        ]
        if data.is_file():
            if not data.name.endswith(SUFFIXES):
                return None
            return data if "outputs" in next(read(data)).fields else None
        if data.is_dir() and not any((data / f"{name}{suffix}").is_file() for name in names for suffix in SUFFIXES):
            return None
        return found(data, names, self.name)

    def _given(self, record: Record) -> Example:
        prompt, prefix = record.text("input"), record.fields.get("answer_prefix") or ""
        if not prefix:  # older files end the input with it
            at = max(prompt.rfind(start) for start in _PREFIX_STARTS)
            prompt, prefix = (prompt[:at], prompt[at:]) if at >= 0 else (prompt, "")
        answers = record.texts("outputs")
        facts = needles.needle_lines(prompt, answers) if self.set in needles.SETS else ()
        if self.set == "vt":
            facts = chains.assignments(prompt, answers)
        return Example(
            id=str(record.fields.get("index", record.where.rpartition(" ")[2])),
            answers=answers,
            chat=True,
            max_new_tokens=self.max_new_tokens,
            depth=facts[0][0] / len(prompt) if facts else None,
            answer_prefix=prefix,
            **self._asked(prompt, facts),
        )

    def _asked(self, prompt: str, facts: tuple[Span, ...], needs: tuple[tuple[Span, ...], ...] = ()) -> dict[str, Any]:
        """The fields of an `Example` that say where its text, evidence and question are."""
        front, behind = _INSTRUCTIONS.get(self.set, " afterwards.\n"), _ASKED.get(self.set, "")
        first, last = prompt.rfind(front), prompt.rfind("\n" + (behind or "What "))
        return {
            "prompt": prompt,
            "evidence": (facts[0][0], facts[-1][1]) if facts else None,
            "begins": first + len(front) if first >= 0 else 0,
            "asks": last + 1 if last >= 0 else None,
            "question": prompt[last + 1 + len(behind) :].strip() if last >= 0 else "",
            "needs": needs or tuple((fact,) for fact in facts),
        }

    def _draw(self, length: int, data: Path | None, seed: int) -> Callable[[int, int], Text]:
        """A function that draws the text of an index with a number of units of filling."""
        if self.set.startswith("qa_"):
            asked = (
                questions.squad_questions(data, self.name)
                if self.set == "qa_1"
                else questions.hotpot_questions(data, self.name)
            )
            self.random(seed, "questions").shuffle(asked)
            documents = sorted({text for question in asked for text in question.documents})

            def ask(index: int, units: int) -> Text:
                return questions.qa(asked[index % len(asked)], documents, self.random(seed, index), units)

            return ask
        make: Callable[[random.Random, int], Text] = chains.variables
        if self.set in needles.SETS:
            kind = needles.SETS[self.set]
            make = partial(needles.niah, kind, needles.essay(data) if kind.haystack == "essay" else [])
        elif self.set == "cwe":
            make = partial(counts.common_words, small=length < 4096)
        elif self.set == "fwe":
            make = partial(counts.frequent_words, vocabulary=max((length - self.max_new_tokens) // 50, 5))

        def draw(index: int, units: int) -> Text:
            return make(self.random(seed, index), units)

        return draw


def _filling(size: Callable[[int], int], length: int, guess: int, task: str) -> int:
    """The most units of filling with which a text has at most `length` tokens, to within 1% of it."""
    least = size(1)
    if least > length:
        raise EvalError(f"{task}: length {length}: expected at least {least}, the length of the text without filling")
    low, high, units = 1, None, max(guess, 2)
    while high is None or high - low > 1:
        filled = size(units)
        if filled <= length:
            low = units
            if filled >= 0.99 * length:
                break
        else:
            high = units
        per_unit = (filled - least) / (units - 1)
        wanted = units + (0.995 * length - filled) / per_unit if per_unit > 0 else 2 * units
        units = min(max(int(wanted), low + 1), 4 * units, high - 1 if high else 4 * units)
    return low
