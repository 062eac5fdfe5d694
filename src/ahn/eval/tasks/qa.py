"""Ordinary questions about long texts: articles, stories, several passages, meetings, joined to any length."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

from ahn.dialogue import LABEL, SEPARATOR
from ahn.errors import EvalError
from ahn.eval.articles import squad
from ahn.eval.tasks.base import Example, Record, Span, Task, found, places, read, template_tokens, tokens

DEFAULT_LENGTH = 16_384
INSTRUCTION = "Answer from the text in as few words as possible."
ROOM = 96  # tokens kept free for a question and its instruction
ANSWER_TOKENS, SUMMARY_TOKENS = 32, 192
FILES = {
    "squad": ("squad-dev", "squad"),
    "fairytaleqa": ("fairytaleqa-valid", "fairytaleqa"),
    "musique": ("musique-train100", "musique"),
    "hotpotqa": ("hotpotqa-train100", "hotpotqa"),
    "qmsum": ("qmsum-valid", "qmsum"),
}
FILLER = ("squad-train",)  # articles that make texts longer than the questions' own
_PASSAGE = re.compile(r"^Passage \d+:\n", re.MULTILINE)


@dataclass(frozen=True)
class Asked:
    """A question on a group of pieces. `needs`: for each fact that the answer takes, where it may stand: piece of the
    group, first character and end."""

    text: str
    answers: tuple[str, ...]
    needs: tuple[tuple[tuple[int, int, int], ...], ...]


@dataclass(frozen=True)
class Group:
    """Pieces of text that stay in one context, and what is asked about them."""

    pieces: tuple[str, ...]
    asked: tuple[Asked, ...]


class QA(Task):
    """Many questions on each text, so that a text is read once and asked often.

    `squad` joins articles, `fairytaleqa` stories, `musique` and `hotpotqa` the passages of several questions, shuffled;
    a `qmsum` meeting stands alone. A text and the longest question have at most `length` tokens (None: 16,384). Texts
    longer than all of SQuAD's development articles are filled up with training articles, spread evenly.
    """

    suite = "qa"
    sets = tuple(FILES)
    groups: ClassVar = {"short": ("squad", "fairytaleqa", "musique", "hotpotqa")}

    @property
    def metric(self) -> str:
        return "rouge" if self.set == "qmsum" else "f1"

    def examples(
        self, *, tokenizer: Any, length: int | None, data: Path | None, seed: int, limit: int | None
    ) -> Iterator[Example]:
        if data is None:
            raise EvalError(f"{self.name}: expected --data FOLDER with {FILES[self.set][0]}.jsonl")
        length = length or DEFAULT_LENGTH
        room = length - template_tokens(tokenizer) - ROOM - (SUMMARY_TOKENS if self.set == "qmsum" else ANSWER_TOKENS)
        groups = self._groups(data)
        every = [(at, number) for at, group in enumerate(groups) for number in range(len(group.asked))]
        contexts = self._contexts(groups, tokenizer, room, data)
        if not contexts:
            raise EvalError(f"{self.name}: length {length}: the texts are too short, or none fits")
        inside = {at for members, _ in contexts for at in members}
        order = list(every)
        self.random(seed, "questions").shuffle(order)  # of all, so that other lengths ask the same
        wanted = set([one for one in order if one[0] in inside][:limit])
        if not wanted:
            raise EvalError(f"{self.name}: length {length}: no question")
        for members, filler in contexts:
            document, places = self._joined(members, [groups[at] for at in members], filler, seed)
            for at in members:
                for number, asked in enumerate(groups[at].asked):
                    if (at, number) in wanted:
                        yield self._example(f"{at}-{number}", document, asked, places[at])

    def _contexts(
        self, groups: Sequence[Group], tokenizer: Any, room: int, data: Path
    ) -> list[tuple[list[int], list[str]]]:
        """Members of each text, by their place in `groups`, and what fills it up. The last, shorter text is left out
        if there is another."""
        sizes = [sum(tokens(tokenizer, piece + SEPARATOR) for piece in group.pieces) for group in groups]
        if self.set == "qmsum":
            return [([at], []) for at, size in enumerate(sizes) if size <= room]
        found: list[tuple[list[int], list[str]]] = []
        members: list[int] = []
        used = 0
        for at, size in enumerate(sizes):
            if size > room:
                continue
            if used + size > room:
                found.append((members, []))
                members, used = [], 0
            members.append(at)
            used += size
        if found:
            return found
        if self.set != "squad":
            return [(members, [])] if members else []
        return [(members, self._filler(tokenizer, room - used, data))]

    def _filler(self, tokenizer: Any, room: int, data: Path) -> list[str]:
        if not data.is_dir():
            return []
        filler: list[str] = []
        for article in squad(found(data, FILLER, self.name), self.name):
            for paragraph in article["paragraphs"]:
                text = paragraph["context"].strip()
                room -= tokens(tokenizer, text + SEPARATOR)
                if room < 0:
                    return filler
                filler.append(text)
        return filler

    def _joined(
        self, members: Sequence[int], groups: Sequence[Group], filler: Sequence[str], seed: int
    ) -> tuple[str, dict[int, list[Span]]]:
        """The text, and for each member where its pieces stand."""
        pieces = [
            (at, i, text) for at, group in zip(members, groups, strict=True) for i, text in enumerate(group.pieces)
        ]
        if self.set in ("musique", "hotpotqa"):
            self.random(seed, "order", *members).shuffle(pieces)
        spread: list[tuple[int, int, str]] = []
        for number, piece in enumerate(pieces):
            low, high = (len(filler) * n // max(len(pieces), 1) for n in (number, number + 1))
            spread += [(-1, 0, text) for text in filler[low:high]]
            spread.append(piece)
        ends = list(accumulate(len(text) + len(SEPARATOR) for _, _, text in spread))
        places: dict[int, list[Span]] = {
            at: [(0, 0)] * len(group.pieces) for at, group in zip(members, groups, strict=True)
        }
        for (at, i, text), end in zip(spread, ends, strict=True):
            if at >= 0:
                start = end - len(SEPARATOR) - len(text)
                places[at][i] = start, start + len(text)
        return SEPARATOR.join(text for _, _, text in spread), places

    def _example(self, id: str, document: str, asked: Asked, places: Sequence[Span]) -> Example:
        spans = tuple(
            tuple((places[piece][0] + start, places[piece][0] + end) for piece, start, end in one)
            for one in asked.needs
        )
        summary = self.set == "qmsum"
        instruction = "" if summary else f" {INSTRUCTION}"
        evidence = spans[0][0] if len(spans) == 1 and len(spans[0]) == 1 else None
        return Example(
            id=id,
            prompt=f"{document}{SEPARATOR}{LABEL}{asked.text.strip()}{instruction}",
            answers=asked.answers,
            chat=True,
            max_new_tokens=SUMMARY_TOKENS if summary else ANSWER_TOKENS,
            evidence=evidence,
            depth=spans[0][0][0] / len(document) if spans else None,
            asks=len(document) + len(SEPARATOR),
            question=asked.text.strip(),
            needs=spans,
            apart=True,
        )

    def _groups(self, data: Path) -> list[Group]:
        if self.set == "squad":
            return [_paragraph(p) for article in _articles(data, self.name) for p in article["paragraphs"]]
        make = {"fairytaleqa": _story, "qmsum": _story}.get(self.set, _passages)
        groups = [make(record) for record in read(found(data, FILES[self.set], self.name))]
        if not any(group.asked for group in groups):
            raise EvalError(f"{data}: no question that has an answer")
        return groups


def _articles(data: Path, task: str) -> list[dict[str, Any]]:
    return squad(found(data, FILES["squad"], task), task)


def _paragraph(paragraph: dict[str, Any]) -> Group:
    text = paragraph["context"].strip()
    return Group((text,), tuple(_on(text, qa["question"], tuple(qa["answers"])) for qa in paragraph["qas"]))


def _story(record: Record) -> Group:
    text = record.text("context").strip()
    qas = [(qa.text("question"), qa.texts("answers")) for qa in record.records("qas")]
    return Group((text,), tuple(_on(text, question, answers) for question, answers in qas))


def _on(text: str, question: str, answers: tuple[str, ...]) -> Asked:
    """A question whose evidence is wherever an answer occurs in the text; unknown if none does."""
    return Asked(question, answers, tuple(tuple((0, *span) for span in fact) for fact in places(text, answers)))


def _passages(record: Record) -> Group:
    """Passages of a question over several of them; the supporting ones are named by title, or by number from 0."""
    pieces = tuple(piece.strip() for piece in _PASSAGE.split(record.text("context")) if piece.strip())
    wanted = record["supporting"]
    if not isinstance(wanted, list) or not wanted:
        raise EvalError(f"{record.where}: field 'supporting': expected titles, or numbers of passages")
    chosen = [
        i
        for i, piece in enumerate(pieces)
        if (piece.partition("\n")[0].strip() in wanted if isinstance(wanted[0], str) else i in wanted)
    ]
    needs = tuple(((i, 0, len(pieces[i])),) for i in chosen)
    return Group(pieces, (Asked(record.text("input"), record.texts("answers"), needs),))
