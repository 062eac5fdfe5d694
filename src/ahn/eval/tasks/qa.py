"""Ordinary questions about long texts: articles, stories, several passages, meetings, joined to any length."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, ClassVar

from ahn.dialogue import LABEL, NOT_FOUND, SEPARATOR
from ahn.errors import EvalError
from ahn.eval.articles import squad
from ahn.eval.places import Span, places
from ahn.eval.records import Record, found, read
from ahn.eval.tasks.base import Example, Task, template_tokens, tokens

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
ABSENT = "-absent"  # behind the name of a set: questions of other texts
FILLER = ("squad-train",)  # articles that make texts longer than the questions' own
Text = tuple[str, dict[int, list[Span]]]
"""A text, and the places of the pieces of each of its groups."""
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
    """Pieces of text that stay in one context, and the questions about them. `origin`: number of article or story."""

    pieces: tuple[str, ...]
    asked: tuple[Asked, ...]
    origin: int


class QA(Task):
    """Many questions on each text, so that a text is read once and asked often.

    `squad` joins articles, `fairytaleqa` stories, `musique` and `hotpotqa` the passages of several questions, shuffled;
    a `qmsum` meeting stands alone. A text and the longest question have at most `length` tokens (None: 16,384). Texts
    longer than all of SQuAD's development articles are filled up with training articles, spread evenly.

    `squad-absent` and `fairytaleqa-absent` ask the same texts questions of other articles or stories, none of whose
    answers occurs in the text. The right answer is NOT_FOUND.
    """

    suite = "qa"
    sets = (*FILES, f"squad{ABSENT}", f"fairytaleqa{ABSENT}")
    groups: ClassVar = {"short": ("squad", "fairytaleqa", "musique", "hotpotqa")}

    def __init__(self, set: str) -> None:
        super().__init__(set)
        self.source = set.removesuffix(ABSENT)
        self.absent = set != self.source

    @property
    def metric(self) -> str:
        return "rouge" if self.set == "qmsum" else "f1"

    def examples(
        self, *, tokenizer: Any, length: int | None, data: Path | None, seed: int, limit: int | None
    ) -> Iterator[Example]:
        if data is None:
            raise EvalError(f"{self.name}: expected --data FOLDER with {FILES[self.source][0]}.jsonl")
        length = length or DEFAULT_LENGTH
        room = length - template_tokens(tokenizer) - ROOM - (SUMMARY_TOKENS if self.set == "qmsum" else ANSWER_TOKENS)
        groups = self._groups(data)
        every = [(at, number) for at, group in enumerate(groups) for number in range(len(group.asked))]
        contexts = self._contexts(groups, tokenizer, room, data)
        if not contexts:
            raise EvalError(f"{self.name}: length {length}: expected texts that fit and together fill it")
        order = list(every)
        self.random(seed, "questions").shuffle(order)  # shuffles all questions, so that other lengths ask the same ones
        texts = [self._joined(members, [groups[at] for at in members], filler, seed) for members, filler in contexts]
        wanted = sorted(islice(self._placed(order, groups, texts, seed), limit))
        if not wanted:
            raise EvalError(f"{self.name}: length {length}: no question")
        for place, at, number in wanted:
            document, places = texts[place]
            yield self._example(f"{at}-{number}", document, groups[at].asked[number], places.get(at, ()))

    def _placed(
        self, order: Sequence[tuple[int, int]], groups: Sequence[Group], texts: Sequence[Text], seed: int
    ) -> Iterator[tuple[int, int, int]]:
        """Pairs of the number of a text and a question that can be asked about it, in this order."""
        if not self.absent:
            home = {at: place for place, (_, places) in enumerate(texts) for at in places}
            yield from ((home[at], at, number) for at, number in order if at in home)
            return
        chance = self.random(seed, "texts")
        lower = [document.lower() for document, _ in texts]
        origins = [{groups[at].origin for at in places} for _, places in texts]
        for at, number in order:
            place, group = chance.randrange(len(texts)), groups[at]
            answers = [answer.strip().lower() for answer in group.asked[number].answers]
            if group.origin not in origins[place] and not any(answer in lower[place] for answer in answers):
                yield place, at, number

    def _contexts(
        self, groups: Sequence[Group], tokenizer: Any, room: int, data: Path
    ) -> list[tuple[list[int], list[str]]]:
        """The groups of each text, by their index in `groups`, and the pieces that fill it up. The last, shorter text
        is left out if there is another."""
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
        if self.source != "squad":
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

    def _joined(self, members: Sequence[int], groups: Sequence[Group], filler: Sequence[str], seed: int) -> Text:
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
        if self.absent:
            asked = Asked(asked.text, (NOT_FOUND,), ())
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
        if self.source == "squad":
            articles = enumerate(squad(found(data, FILES["squad"], self.name), self.name))
            return [_paragraph(p, number) for number, article in articles for p in article["paragraphs"]]
        make = {"fairytaleqa": _story, "qmsum": _story}.get(self.source, _passages)
        records = enumerate(read(found(data, FILES[self.source], self.name)))
        groups = [make(record, number) for number, record in records]
        if not any(group.asked for group in groups):
            raise EvalError(f"{data}: no question that has an answer")
        return groups


def _paragraph(paragraph: dict[str, Any], origin: int) -> Group:
    text = paragraph["context"].strip()
    return Group((text,), tuple(_on(text, qa["question"], tuple(qa["answers"])) for qa in paragraph["qas"]), origin)


def _story(record: Record, origin: int) -> Group:
    text = record.text("context").strip()
    qas = [(qa.text("question"), qa.texts("answers")) for qa in record.records("qas")]
    return Group((text,), tuple(_on(text, question, answers) for question, answers in qas), origin)


def _on(text: str, question: str, answers: tuple[str, ...]) -> Asked:
    """A question whose evidence is every place of an answer in the text. It is unknown if no answer occurs."""
    return Asked(question, answers, tuple(tuple((0, *span) for span in fact) for fact in places(text, answers)))


def _passages(record: Record, origin: int) -> Group:
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
    return Group(pieces, (Asked(record.text("input"), record.texts("answers"), needs),), origin)
