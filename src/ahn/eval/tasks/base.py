"""The base of all suites of tasks.

A suite is one file in this folder with one class. Its tasks are named "suite/set". A task turns the records of a
benchmark, or a seed, into `Example`s, and scores the answers to them. It knows no model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from ahn.dialogue import Dialogue, plain
from ahn.errors import EvalError
from ahn.eval import metrics
from ahn.eval.places import Span, before, moved, runs
from ahn.eval.records import Record, found, hub, read
from ahn.registry import did_you_mean


@dataclass(frozen=True)
class Example:
    """One question to a model.

    Args:
        id: stable, unique within the task.
        prompt: text for the model, before the chat template; of a loss task, the text itself.
        answers: right answers. chat: whether the benchmark wraps the prompt in the chat template.
        max_new_tokens: of the answer.
        evidence: characters start to end - 1 of `prompt` that hold all that the answer needs; None: unknown.
        depth: 0 to 1, where in the text the evidence is, if that is known.
        answer_prefix: the beginning of the answer, after the chat template. It is not part of the prediction.
        extra: further values for scoring: all_classes, gold_ans. `evidence_cut`: truncation took the evidence.
        begins: character of `prompt` where the text begins, behind instructions.
        asks: character where the text ends and the question about it begins, the end of `prompt` if the question stands
            in front; None: nothing is asked about a text.
        question: the question alone, without instructions: finders look for it in the text.
        needs: the places of each fact that the answer needs. Any place of a fact suffices. Empty: unknown.
        apart: text and question are encoded apart, as `ahn ask` does, so that a text with many questions is read once.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    chat: bool
    max_new_tokens: int
    evidence: Span | None = None
    depth: float | None = None
    answer_prefix: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    asks: int | None = None
    question: str = ""
    needs: tuple[tuple[Span, ...], ...] = ()
    begins: int = 0
    apart: bool = False


class Task:
    """Base of all suites. A new one needs `suite`, `sets`, `metric` and `examples`.

    Args:
        set: one of `sets`.

    Class attributes:
        suite: the file's name. sets: names of its parts, as in the benchmark.
        groups: names of several sets that are asked for together, beside all of them.
        kind: "generate", or "loss" for texts whose loss is measured by position.
        scored_as: the suite of `metrics.METRICS` whose metrics it uses; default: its own. A suite with a metric of its
            own defines `needs` and `score`.
    """

    suite: ClassVar[str]
    sets: ClassVar[tuple[str, ...]]
    groups: ClassVar[dict[str, tuple[str, ...]]] = {}
    kind: ClassVar[Literal["generate", "loss"]] = "generate"
    scored_as: ClassVar[str] = ""

    def __init__(self, set: str) -> None:
        if set not in self.sets:
            raise EvalError(f"unknown set {set!r} of {self.suite}: {did_you_mean(set, self.sets)}")
        self.set, self.name = set, f"{self.suite}/{set}"

    @property
    def metric(self) -> str:
        """Name of the metric in `metrics.METRICS[scored_as]`."""
        raise NotImplementedError

    @property
    def needs(self) -> tuple[str, ...]:
        """Libraries that scoring imports; `metrics.check_libraries` says what is missing."""
        return metrics.find(self.scored_as or self.suite, self.metric).needs if self.kind == "generate" else ()

    def examples(
        self, *, tokenizer: Any, length: int | None, data: Path | None, seed: int, limit: int | None
    ) -> Iterator[Example]:
        """The examples, the same ones for the same arguments on any machine.

        Args:
            tokenizer: a fast one, with which lengths are counted.
            length: tokens of a prompt. Generated texts fill it. Prompts of fixed texts are truncated to it by the
                suite's own rule. None: the benchmark's own length.
            data: a file, or a folder, in the benchmark's own format; None: the hub, or nothing for generated texts.
            seed: of everything that is drawn, and of which examples `limit` keeps.
            limit: examples at most. Those of a smaller limit are among those of a larger one.

        Raises:
            EvalError: data or a field that is missing, or a length that is too small for the template.
        """
        raise NotImplementedError

    def score(self, example: Example, prediction: str) -> float:
        """The score of an answer, 0 to 1."""
        extra = {key: example.extra.get(key) for key in ("gold_ans", "all_classes")}
        return metrics.score(
            self.scored_as or self.suite, self.metric, self.clean(prediction), example.answers, **extra
        )

    def clean(self, prediction: str) -> str:
        """The part of a prediction that is scored."""
        return prediction

    def truncate(self, ids: list[int], limit: int) -> list[int]:
        """At most `limit` of the ids. The middle is cut out, because the ends hold the instructions (LongBench)."""
        if len(ids) <= limit:
            return ids
        half = limit // 2
        return ids[:half] + ids[len(ids) - half :]

    def shorten(self, example: Example, tokenizer: Any, limit: int | None) -> Example:
        """Cut the prompt of `example` to `limit` tokens with `truncate`. Tokens of the chat template are not counted.

        A place of a fact that is cut out is dropped. A fact without any place left is dropped too, because no finder
        could find it. `evidence_cut` is true for such examples.
        """
        if limit is None:
            return example
        encoded = plain(tokenizer, example.prompt, return_offsets_mapping=True)
        offsets = encoded.offset_mapping
        kept = self.truncate(list(range(len(offsets))), limit)
        if len(kept) == len(offsets):
            return example
        if not kept:
            raise EvalError(f"{self.name}: length {limit}: expected room for some of the prompt")
        pieces = [(offsets[first][0], offsets[last][1]) for first, last in runs(kept)]
        if kept[0] == 0:
            pieces[0] = (0, pieces[0][1])
        if kept[-1] == len(offsets) - 1:
            pieces[-1] = (pieces[-1][0], len(example.prompt))
        prompt = "".join(example.prompt[start:end] for start, end in pieces)
        evidence = example.evidence and moved(example.evidence, pieces)
        left = (tuple(place for span in fact if (place := moved(span, pieces))) for fact in example.needs)
        needs = tuple(fact for fact in left if fact)
        cut = (example.evidence and not evidence) or len(needs) < len(example.needs)
        return replace(
            example,
            prompt=prompt,
            evidence=evidence,
            extra=example.extra | ({"evidence_cut": True} if cut else {}),
            begins=before(example.begins, pieces),
            asks=None if example.asks is None else before(example.asks, pieces),
            needs=needs,
        )

    def random(self, seed: int, *more: object) -> random.Random:
        """Random numbers that depend on the task, the seed, and the further arguments."""
        return random.Random("/".join(map(str, (self.name, seed, *more))))

    def chosen(self, count: int, seed: int, limit: int | None) -> list[int]:
        """Indices of the examples to take, of `count`, in order. A larger limit adds to those of a smaller one."""
        if limit is None or limit >= count:
            return list(range(count))
        order = list(range(count))
        self.random(seed, "order").shuffle(order)
        return sorted(order[:limit])


class FixedTask(Task):
    """A benchmark of fixed records: from a file, a folder or the hub. A new one needs `example` and `hub` as well."""

    def examples(
        self, *, tokenizer: Any, length: int | None, data: Path | None, seed: int, limit: int | None
    ) -> Iterator[Example]:
        records = list(read(found(data, self.files(length), self.name)) if data else hub(self.hub(length)))
        for i in self.chosen(len(records), seed, limit):
            yield self.shorten(self.example(records[i]), tokenizer, length)

    def example(self, record: Record) -> Example:
        raise NotImplementedError

    def files(self, length: int | None) -> list[str]:
        """Names that the set's file may have in a folder, without their endings."""
        return [self.set, f"{self.suite}-{self.set}", *([f"{self.suite}-{self.set}-{length}"] if length else [])]

    def hub(self, length: int | None) -> str:
        """The address of the lines of JSON on the hub: OWNER/NAME/FILE, or OWNER/NAME/ARCHIVE.zip::FILE, where FILE may
        be in any folder of the archive."""
        raise NotImplementedError


def tokens(tokenizer: Any, text: str) -> int:
    """The number of tokens of a text, without the special ones that a tokenizer adds."""
    return len(plain(tokenizer, text).input_ids)


def template_tokens(tokenizer: Any) -> int:
    """Tokens that the chat template adds to a prompt."""
    dialogue = Dialogue(tokenizer)
    return dialogue.start("a").shape[1] if dialogue.has_template else 0
