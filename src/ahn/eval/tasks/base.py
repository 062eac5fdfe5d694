"""What a task is, and how the files of a benchmark are found and read.

A suite is one file in this folder with one class; its tasks are named "suite/set". A task turns a benchmark's records,
or a seed, into `Example`s, and scores what a model says to them. It knows no model.
"""

from __future__ import annotations

import lzma
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from ahn.dialogue import Dialogue, from_json, plain
from ahn.errors import EvalError, some
from ahn.eval import metrics
from ahn.hub import check_dataset
from ahn.registry import did_you_mean

SUFFIXES = (".jsonl", ".jsonl.xz", ".json", ".json.xz")
COPY = "or give a copy with --data FOLDER"
Span = tuple[int, int]


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
        answer_prefix: what the answer begins with, after the chat template; it is not part of the prediction.
        extra: what scoring needs besides: all_classes, gold_ans. `evidence_cut`: truncation took the evidence.
        begins: character of `prompt` where the text begins, behind instructions.
        asks: character where the text ends and the question about it begins, the end of `prompt` if the question stands
            in front; None: nothing is asked about a text.
        question: the question alone, without instructions: finders look for it in the text.
        needs: where each fact that the answer takes stands; any of a fact's places will do. Empty: unknown.
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
        suite: the file's name. sets: what it measures, in the benchmark's own names.
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
            length: tokens that generated texts fill, and that prompts of fixed texts are truncated to by the suite's
                own rule; None: whatever the benchmark has.
            data: a file, or a folder, in the benchmark's own format; None: the hub, or nothing for generated texts.
            seed: of everything that is drawn, and of which examples `limit` keeps.
            limit: at most so many; fewer are a part of more.

        Raises:
            EvalError: data or a field that is missing, or a length that is too small for the template.
        """
        raise NotImplementedError

    def score(self, example: Example, prediction: str) -> float:
        """How good an answer is, 0 to 1."""
        extra = {key: example.extra.get(key) for key in ("gold_ans", "all_classes")}
        return metrics.score(
            self.scored_as or self.suite, self.metric, self.clean(prediction), example.answers, **extra
        )

    def clean(self, prediction: str) -> str:
        """The part of what was said that counts."""
        return prediction

    def truncate(self, ids: list[int], limit: int) -> list[int]:
        """At most `limit` of the ids: the middle goes, as the ends hold the instructions (LongBench)."""
        if len(ids) <= limit:
            return ids
        half = limit // 2
        return ids[:half] + ids[len(ids) - half :]

    def shorten(self, example: Example, tokenizer: Any, limit: int | None) -> Example:
        """`example` with a prompt of at most `limit` tokens, without the template's, as `truncate` has it.

        Places of a fact that are cut out are dropped, and so is a fact that has no place left: no finder can find it.
        `evidence_cut` tells such examples apart.
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
        pieces = [(offsets[first][0], offsets[last][1]) for first, last in _runs(kept)]
        if kept[0] == 0:
            pieces[0] = (0, pieces[0][1])
        if kept[-1] == len(offsets) - 1:
            pieces[-1] = (pieces[-1][0], len(example.prompt))
        prompt = "".join(example.prompt[start:end] for start, end in pieces)
        evidence = example.evidence and _moved(example.evidence, pieces)
        left = (tuple(place for span in fact if (place := _moved(span, pieces))) for fact in example.needs)
        needs = tuple(fact for fact in left if fact)
        cut = (example.evidence and not evidence) or len(needs) < len(example.needs)
        return replace(
            example,
            prompt=prompt,
            evidence=evidence,
            extra=example.extra | ({"evidence_cut": True} if cut else {}),
            begins=_before(example.begins, pieces),
            asks=None if example.asks is None else _before(example.asks, pieces),
            needs=needs,
        )

    def random(self, seed: int, *more: object) -> random.Random:
        """Numbers of this task, seed, and whatever else they should depend on."""
        return random.Random("/".join(map(str, (self.name, seed, *more))))

    def chosen(self, count: int, seed: int, limit: int | None) -> list[int]:
        """Which of `count` examples to take, in order; those of a smaller limit are among those of a larger."""
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
        """Where on the hub the lines of JSON are: OWNER/NAME/FILE, or OWNER/NAME/ARCHIVE.zip::FILE, anywhere in it."""
        raise NotImplementedError


class Record:
    """One record of a benchmark; a field that is missing or of the wrong kind is named with the file and the line."""

    def __init__(self, where: str, fields: Any) -> None:
        if not isinstance(fields, dict):
            raise EvalError(f"{where}: {type(fields).__name__}: expected a record with fields")
        self.where, self.fields = where, fields

    def __getitem__(self, name: str) -> Any:
        if self.fields.get(name) is None:
            shown = [field if field.isprintable() else repr(field) for field in self.fields]
            raise EvalError(f"{self.where}: no field {name!r}; there are {', '.join(shown) or 'none'}")
        return self.fields[name]

    def text(self, name: str) -> str:
        value = self[name]
        if not isinstance(value, str):
            raise EvalError(f"{self.where}: field {name!r} is {type(value).__name__}: expected text")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A text, or several, of which there must be one."""
        value = self[name]
        values = [value] if isinstance(value, str) else value
        if not (isinstance(values, list) and values and all(isinstance(v, str) for v in values)):
            raise EvalError(f"{self.where}: field {name!r}: expected one or more texts")
        return tuple(values)

    def texts_or_none(self, name: str) -> tuple[str, ...] | None:
        """`texts` of a field that may be missing."""
        return None if self.fields.get(name) is None else self.texts(name)

    def records(self, name: str) -> list[Record]:
        """The records in a field."""
        value = self[name]
        if not isinstance(value, list):
            raise EvalError(f"{self.where}: field {name!r} is {type(value).__name__}: expected a list of records")
        return [Record(f"{self.where}, {name} {number}", fields) for number, fields in enumerate(value, 1)]


def found(data: Path, names: Sequence[str], task: str) -> Path:
    """The file `data`, or the one in the folder `data` that has one of the names."""
    if not data.exists():
        raise EvalError(f"{data}: no such file or folder; expected the data of {task}")
    if data.is_file():
        return data
    candidates = [data / f"{name}{suffix}" for name in names for suffix in SUFFIXES]
    for path in candidates:
        if path.is_file():
            return path
    expected = ", ".join(f"{name}.jsonl" for name in names)
    there = sorted(path.name for path in data.iterdir() if path.is_file())
    raise EvalError(
        f"{data}: no data of {task} in this folder; expected {expected}, or one of these with .xz; there is "
        f"{some(there, 12) or 'no file'}"
    )


def open_text(path: Path) -> str:
    """The text of a file, which may be xz-compressed."""
    try:
        data = path.read_bytes()
        return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8-sig")
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise EvalError(f"{path}: cannot be read: {error}") from error


def read(path: Path) -> Iterator[Record]:
    """The records of a file: a line each (.jsonl), or in one list (.json)."""
    text = open_text(path)
    if path.name.removesuffix(".xz").endswith(".json"):
        values = _json(text, str(path))
        values = values.get("data") if isinstance(values, dict) else values  # SQuAD's own file
        if not isinstance(values, list):
            raise EvalError(f"{path}: {type(values).__name__}: expected a list of records")
        for number, value in enumerate(values, 1):
            yield Record(f"{path}, record {number}", value)
        return
    empty = True
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            empty = False
            where = f"{path}, line {number}"
            yield Record(where, _json(line, where))
    if empty:
        raise EvalError(f"{path}: no records")


def _json(text: str, where: str) -> Any:
    try:
        return from_json(text)
    except (ValueError, RecursionError) as error:
        raise EvalError(f"{where}: not JSON: {error}") from error


def hub(source: str, **options: Any) -> Iterator[Record]:
    """Records of a dataset on the hub: OWNER/NAME, or lines of JSON in it (see `FixedTask.hub`).

    The lines are read as they are, without the code that some datasets bring and new versions of the library refuse.

    Args:
        options: what `datasets.load_dataset` takes besides: name, split.
    """
    try:
        import datasets
    except ImportError as error:
        raise EvalError(f"{source}: needs the datasets library: pip install 'ahn[eval]'; {COPY}") from error
    owner, name, *rest = source.split("/", 2)
    arguments: dict[str, Any] = {"path": f"{owner}/{name}", "streaming": True, **options}
    if rest:
        archive, _, member = rest[0].partition("::")
        url = f"hf://datasets/{owner}/{name}/{archive}"
        arguments |= {"path": "json", "data_files": f"zip://**/{member}::{url}" if member else url, "split": "train"}
    try:
        check_dataset(f"{owner}/{name}")
        for number, fields in enumerate(datasets.load_dataset(**arguments), 1):
            yield Record(f"{source}, record {number}", fields)
    except EvalError:
        raise
    except Exception as error:  # the library's own, those of its readers, and those of the hub client's HTTP library
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EvalError(f"{source}: cannot be loaded from the hub: {reason}; {COPY}") from error


def on_a_text(
    template: str, context: str, evidence: Span | None = None, question: str = "", **fields: str
) -> dict[str, Any]:
    """The fields of an `Example` that say where its text, evidence and question are.

    Args:
        template: of the prompt, with {context} and the names in `fields`.
        evidence: characters of `context`.
        question: about the context; empty if nothing is asked about it.
    """
    before, after = (part.format(**fields) for part in template.split("{context}"))
    start, end = len(before), len(before + context)
    place = evidence and (evidence[0] + start, evidence[1] + start)
    return {
        "prompt": before + context + after,
        "evidence": place,
        "depth": evidence and evidence[0] / len(context),
        "begins": start,
        "asks": end + len(after) - len(after.lstrip()) if question.strip() else None,
        "question": question.strip(),
        "needs": ((place,),) if place else (),
    }


def places(text: str, answers: Sequence[str], start: int = 0) -> tuple[tuple[Span, ...], ...]:
    """`Example.needs` of a fact that stands wherever an answer occurs in `text`; empty if none does.

    Args:
        start: of the text in the prompt.
    """
    spans = {
        (start + place.start(), start + place.end())
        for answer in answers
        if answer.strip()
        for place in re.finditer(re.escape(answer.strip()), text, re.IGNORECASE)
    }
    return (tuple(sorted(spans)),) if spans else ()


def only_place(text: str, wanted: str) -> Span | None:
    """Where `wanted` occurs, if it does so once."""
    at = text.find(wanted) if wanted else -1
    return None if at < 0 or text.find(wanted, at + 1) >= 0 else (at, at + len(wanted))


def tokens(tokenizer: Any, text: str) -> int:
    """How many there are in a text, without the special ones that a tokenizer adds."""
    return len(plain(tokenizer, text).input_ids)


def template_tokens(tokenizer: Any) -> int:
    """Tokens that the chat template adds to a prompt."""
    dialogue = Dialogue(tokenizer)
    return dialogue.start("a").shape[1] if dialogue.has_template else 0


def _runs(numbers: Sequence[int]) -> list[Span]:
    """First and last of each run of consecutive numbers."""
    runs: list[Span] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1] = (runs[-1][0], n)
        else:
            runs.append((n, n))
    return runs


def _moved(span: Span, pieces: Sequence[Span]) -> Span | None:
    """Where `span` is when only the pieces are left, if one of them holds it."""
    before = 0
    for start, end in pieces:
        if start <= span[0] and span[1] <= end:
            return span[0] - start + before, span[1] - start + before
        before += end - start
    return None


def _before(place: int, pieces: Sequence[Span]) -> int:
    """Where the character `place` is when only the pieces are left: how much of them stands in front of it."""
    return sum(min(max(place - start, 0), end - start) for start, end in pieces)
