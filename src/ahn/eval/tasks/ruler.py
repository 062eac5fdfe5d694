"""RULER (arXiv 2404.06654): texts of any length with facts to find, follow, count or reason about, from a seed.

Templates, sizes and scores are the benchmark's. What is drawn is not: word lists and essays are others, which come with
this package or are given. So scores compare models with each other, and only roughly with published ones.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from ahn.errors import EvalError
from ahn.eval.tasks.articles import squad
from ahn.eval.tasks.base import (
    SUFFIXES,
    Example,
    Record,
    Span,
    Task,
    found,
    hub,
    only_place,
    open_text,
    places,
    read,
    template_tokens,
    tokens,
)

DEFAULT_LENGTH, DEFAULT_COUNT = 4096, 500
HOTPOT = "hotpotqa/hotpot_qa"
DEPTHS = 40  # of a needle: that many from 0 to 1
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."

_NIAH = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text?"
)
_NIAH_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
_NIAH_ONE = _NIAH.replace("Some", "A").replace("are all", "is").replace("are hidden", "is hidden")
_NIAH_ONE_PREFIX = _NIAH_PREFIX.replace("are", "is")
_VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find "
    "all variables that are assigned the value {query} in the text above."
)
_VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {query}, they are: "
)
_CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
_CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
_FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?"
)
_FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
_ONLY = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
_QA = f"{_ONLY}\n\nThe following are given documents.\n\n{{context}}\n\n{_ONLY}\n\nQuestion: {{query}}"
_QA_PREFIX = " Answer:"
_PREFIX_STARTS = (" The special magic ", " Answer:")
_INSTRUCTIONS = {  # in front of the text
    name: template.partition("{context}")[0]
    for name, template in {"vt": _VT, "cwe": _CWE, "fwe": _FWE, "qa_1": _QA, "qa_2": _QA}.items()
}
_ASKED = {  # behind the text, in front of the question
    "vt": "Question: ",
    "cwe": "Question: ",
    "fwe": "Question: Do not provide any explanation. Please ignore the dots '....'. ",
    "qa_1": f"{_ONLY}\n\nQuestion: ",
    "qa_2": f"{_ONLY}\n\nQuestion: ",
}


@dataclass(frozen=True)
class _Needles:
    """haystack: noise, essay or needle. keys, values: words, numbers or uuids. num_values: of each key."""

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_asked: int = 1


_NIAH_SETS = {
    "niah_single_1": _Needles("noise"),
    "niah_single_2": _Needles("essay"),
    "niah_single_3": _Needles("essay", values="uuids"),
    "niah_multikey_1": _Needles("essay", num_keys=4),
    "niah_multikey_2": _Needles("needle"),
    "niah_multikey_3": _Needles("needle", keys="uuids", values="uuids"),
    "niah_multivalue": _Needles("essay", num_values=4),
    "niah_multiquery": _Needles("essay", num_keys=4, num_asked=4),
}
_NEW_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}


@dataclass(frozen=True)
class _Text:
    """What one draw gives; `depth` only where a single place was chosen. `facts`: the statements or documents that
    answer. `needs`: as in `Example`, where a fact's own places are closer; default: the facts."""

    prompt: str
    answer_prefix: str
    answers: tuple[str, ...]
    facts: tuple[Span, ...] = ()
    depth: float | None = None
    needs: tuple[tuple[Span, ...], ...] = ()


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
    sets = (*_NIAH_SETS, *_NEW_TOKENS)
    groups: ClassVar = {"niah": tuple(_NIAH_SETS), "qa": ("qa_1", "qa_2")}

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
        """RULER's own file of this set, if that is what `data` is or holds."""
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
        facts = _needle_lines(prompt, answers) if self.set in _NIAH_SETS else ()
        if self.set == "vt":
            facts = _assignments(prompt, answers)
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

    def _draw(self, length: int, data: Path | None, seed: int) -> Callable[[int, int], _Text]:
        """What draws the text of an index with so many units of filling: the same needles, whatever the filling."""
        if self.set.startswith("qa_"):
            questions = _squad(data, self.name) if self.set == "qa_1" else _hotpot(data, self.name)
            self.random(seed, "questions").shuffle(questions)
            documents = sorted({text for question in questions for text in question.documents})

            def ask(index: int, units: int) -> _Text:
                return _qa(questions[index % len(questions)], documents, self.random(seed, index), units)

            return ask
        make: Callable[[random.Random, int], _Text] = _variables
        if self.set in _NIAH_SETS:
            kind = _NIAH_SETS[self.set]
            make = partial(_niah, kind, _essay(data) if kind.haystack == "essay" else [])
        elif self.set == "cwe":
            make = partial(_common_words, small=length < 4096)
        elif self.set == "fwe":
            make = partial(_frequent_words, vocabulary=max((length - self.max_new_tokens) // 50, 5))

        def draw(index: int, units: int) -> _Text:
            return make(self.random(seed, index), units)

        return draw


def _filling(size: Callable[[int], int], length: int, guess: int, task: str) -> int:
    """The most units whose text has at most `length` tokens, to within 1% of it."""
    least = size(1)
    if least > length:
        raise EvalError(f"{task}: length {length}: expected at least {least}, so much is the text without filling")
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


@cache
def _words() -> dict[str, list[str]]:
    text = files("ahn.eval.data").joinpath("words.json").read_text(encoding="utf-8")
    return {kind: words.split() for kind, words in json.loads(text).items()}


@cache
def _bundled() -> str:
    return files("ahn").joinpath("data/arsene-lupin.txt").read_text(encoding="utf-8")


def _essay(data: Path | None) -> list[str]:
    """Words of the essays."""
    if data is None:
        return _bundled().split()
    paths = [data] if data.is_file() else sorted(data.rglob("*.txt"))
    words = [word for path in paths for word in open_text(path).split()]
    if not words:
        raise EvalError(f"{data}: no text (.txt) for the haystack")
    return words


def _sentences(words: Sequence[str], count: int) -> list[str]:
    """The first `count` words, which begin again at their end, cut into sentences."""
    repeated = [words[i % len(words)] for i in range(count)]
    return re.split(r"(?<=[.!?]) ", " ".join(repeated))


def _drawn(kind: str, chance: random.Random) -> str:
    if kind == "numbers":
        return str(chance.randrange(10**6, 10**7))
    if kind == "words":
        return f"{chance.choice(_words()['adjectives'])}-{chance.choice(_words()['nouns'])}"
    digits = f"{chance.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], "4" + digits[13:16], "8" + digits[17:20], digits[20:]))


def _different(kind: str, count: int, chance: random.Random, taken: set[str]) -> list[str]:
    """`count` that are not among `taken`, which they join."""
    drawn: list[str] = []
    while len(drawn) < count:
        one = _drawn(kind, chance)
        if one not in taken:
            taken.add(one)
            drawn.append(one)
    return drawn


def _niah(kind: _Needles, essay: Sequence[str], chance: random.Random, units: int) -> _Text:
    taken: set[str] = set()
    keys = _different(kind.keys, kind.num_keys, chance, taken)
    values = [_different(kind.values, kind.num_values, chance, taken) for _ in keys]
    asked = sorted(chance.sample(range(len(keys)), kind.num_asked))
    needles = [(k, value) for k, of_key in enumerate(values) for value in of_key]
    chance.shuffle(needles)
    depths = sorted(d / (DEPTHS - 1) for d in chance.sample(range(DEPTHS), len(needles)))

    def sentence(key: str, value: str) -> str:
        return NEEDLE.format(kind=kind.values, key=key, value=value)

    if kind.haystack == "essay":
        hay, joint = _sentences(essay, units), " "
    elif kind.haystack == "noise":
        hay, joint = [NOISE] * units, "\n"
    else:
        others = _different(kind.keys, units, chance, taken)
        false = _different(kind.values, units, chance, taken)
        hay, joint = [sentence(*pair) for pair in zip(others, false, strict=True)], "\n"

    one = len(asked) * kind.num_values == 1
    what = kind.values.removesuffix("s") if one else kind.values
    query = _listed([keys[k] for k in asked])
    before, after = (_NIAH_ONE if one else _NIAH).split("{context}")
    text, spans = before.format(kind=what), []
    last = 0
    for (key, value), depth in zip(needles, depths, strict=True):
        at = round(depth * len(hay))
        text += "".join(piece + joint for piece in hay[last:at])
        if key in asked:
            spans.append((len(text), len(text + sentence(keys[key], value))))
        text += sentence(keys[key], value) + joint
        last = at
    text = (text + joint.join(hay[last:])).rstrip() + after.format(kind=what, query=query)
    return _Text(
        prompt=text,
        answer_prefix=(_NIAH_ONE_PREFIX if one else _NIAH_PREFIX).format(kind=what, query=query),
        answers=tuple(value for k in asked for value in values[k]),
        facts=tuple(spans),
        depth=next(depth for (key, _), depth in zip(needles, depths, strict=True) if key in asked) if one else None,
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else names[0]


def _variables(chance: random.Random, units: int, hops: int = 4) -> _Text:
    """One chain of assignments in noise, behind a short example of one."""

    def chain(letters: int, noise: int) -> _Text:
        names = _variable_names(letters, hops + 1, chance)
        value = str(chance.randrange(10000, 100000))
        said = [f"VAR {names[0]} = {value}"] + [f"VAR {b} = VAR {a} " for a, b in pairwise(names)]
        places = sorted(chance.random() for _ in said)
        before, after = _VT.split("{context}")
        text, last, spans = before, 0, []
        for assignment, place in zip(said, places, strict=True):
            at = round(place * noise)
            text += (NOISE + "\n") * (at - last)
            spans.append((len(text), len(text + assignment)))
            text += assignment + "\n"
            last = at
        text = (text + (NOISE + "\n") * (noise - last)).removesuffix("\n") + after.format(query=value)
        prefix = _VT_PREFIX.format(count=len(names), query=value)
        return _Text(text, prefix, tuple(names), tuple(spans))

    shown = chain(letters=3, noise=5)
    shot = shown.prompt + shown.answer_prefix + " ".join(shown.answers) + "\n\n"
    asked = chain(letters=5, noise=units)
    facts = tuple((start + len(shot), end + len(shot)) for start, end in asked.facts)
    return _Text(shot + asked.prompt, asked.answer_prefix, asked.answers, facts)


def _variable_names(letters: int, count: int, chance: random.Random) -> list[str]:
    names: list[str] = []
    while len(names) < count:
        name = "".join(chance.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    return names


@cache
def _vocabulary() -> tuple[str, ...]:
    """Words to count: single ones, then pairs, as many as any length may need."""
    lists = _words()
    single = {*lists["adjectives"], *lists["nouns"], *re.findall(r"\b[a-z]{4,}\b", _bundled())}
    pairs = (f"{adjective}-{noun}" for adjective in lists["adjectives"] for noun in lists["nouns"])
    return (*sorted(single), *pairs)


def _common_words(chance: random.Random, units: int, small: bool) -> _Text:
    """Ten words are common (30 times), `units` others are not (3 times); shorter texts have fewer of both."""

    def numbered(words: Sequence[str]) -> str:
        return " ".join(f"{n}. {word}" for n, word in enumerate(words, 1))

    def drawn(others: int, often: int, seldom: int) -> tuple[str, list[str]]:
        words = chance.sample(_vocabulary()[: max(4000, 2 * (others + 10))], others + 10)
        mixed = words[:10] * often + words[10:] * seldom
        chance.shuffle(mixed)
        return numbered(mixed), words[:10]

    context, answers = drawn(10, 3, 1) if small else drawn(30, 10, 3)
    shot = _CWE.format(context=context) + _CWE_PREFIX + " " + numbered(answers) + "\n"
    context, answers = drawn(units, 6, 1) if small else drawn(units, 30, 3)
    return _Text(shot + _CWE.format(context=context), _CWE_PREFIX, tuple(answers))


def _frequent_words(chance: random.Random, units: int, vocabulary: int) -> _Text:
    """Coded words, the k-th most frequent with share k^-2 / zeta(2) of ten times `units`; the first is "..."."""
    words: list[str] = []
    while len(words) < vocabulary:
        word = "".join(chance.choices(string.ascii_lowercase, k=6))
        if word not in words:
            words.append(word)
    words[0] = "..."
    total = 10 * units + 30  # so many that the fourth occurs at all
    said = [word for k, word in enumerate(words, 1) for _ in range(int(total * k**-2 / 1.6449340668482264))]
    chance.shuffle(said)
    return _Text(_FWE.format(context=" ".join(said)), _FWE_PREFIX, tuple(words[1:4]))


@dataclass(frozen=True)
class _Question:
    """gold: documents that answer it. beside: those always shown with them. near: those shown before any others.
    quoted: the answer stands in the document, word for word."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    beside: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    quoted: bool = False

    @property
    def documents(self) -> tuple[str, ...]:
        return self.gold + self.beside + self.near


def _qa(question: _Question, documents: Sequence[str], chance: random.Random, units: int) -> _Text:
    own = set(question.documents)
    near = chance.sample(question.near, len(question.near))
    others = [text for text in documents if text not in own] or [""]
    others = chance.sample(others, len(others))
    added = [*near, *(others[i % len(others)] for i in range(max(units - len(near), 0)))][:units]
    shown = [*question.gold, *question.beside, *added]
    chance.shuffle(shown)
    before, after = _QA.split("{context}")
    text, spans = before, []
    for number, document in enumerate(shown, 1):
        text += f"Document {number}:\n"
        if document in question.gold:
            spans.append((len(text), len(text + document)))
        text += document + "\n\n"
    text = text.removesuffix("\n\n")
    return _Text(
        prompt=text + after.format(query=question.text),
        answer_prefix=_QA_PREFIX,
        answers=question.answers,
        facts=tuple(spans),
        depth=(spans[0][0] - len(before)) / (len(text) - len(before)) if len(spans) == 1 else None,
        needs=places(text[slice(*spans[0])], question.answers, spans[0][0]) if question.quoted else (),
    )


def _squad(data: Path | None, task: str) -> list[_Question]:
    asked = []
    for article in squad(data, task):
        texts = [paragraph["context"] for paragraph in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            gold = paragraph["context"]
            near = tuple(text for text in texts if text != gold)
            asked += [
                _Question(qa["question"], tuple(qa["answers"]), (gold,), near=near, quoted=True)
                for qa in paragraph["qas"]
            ]
    if not asked:
        raise EvalError(f"{data or task}: no question that has an answer")
    return asked


def _hotpot(data: Path | None, task: str) -> list[_Question]:
    if data is None:
        return [_of_hotpot(record) for record in hub(HOTPOT, name="distractor", split="validation")]
    names = ("hotpotqa", "hotpotqa-train100", "hotpot_dev_distractor_v1")
    return [_of_hotpot(record) for record in read(found(data, names, task))]


def _of_hotpot(record: Record) -> _Question:
    """HotpotQA's own record, the hub's, or LongBench's, which does not say which passages answer."""
    context = record["context"]
    if isinstance(context, str):
        passages = tuple(part.strip() for part in re.split(r"^Passage \d+:\n", context, flags=re.MULTILINE)[1:])
        return _Question(record.text("input"), record.texts("answers"), (), passages)
    facts = record.fields.get("supporting_facts") or []
    try:
        if isinstance(context, dict):
            context = list(zip(context["title"], context["sentences"], strict=True))
        needed = set(facts["title"]) if isinstance(facts, dict) else {title for title, _ in facts}
        texts = {title: f"{title}\n{''.join(sentences)}" for title, sentences in context}
    except (KeyError, TypeError, ValueError) as error:
        raise EvalError(
            f"{record.where}: fields 'context' and 'supporting_facts' are not HotpotQA's: {error}"
        ) from error
    gold = tuple(text for title, text in texts.items() if title in needed)
    beside = tuple(text for title, text in texts.items() if title not in needed)
    return _Question(record.text("question"), record.texts("answer"), gold, beside)


def _needle_lines(prompt: str, answers: Sequence[str]) -> tuple[Span, ...]:
    """The needles that hold the answers, in their order in the text; none unless each answer is in one."""
    spans = []
    for answer in answers:
        place = only_place(prompt, f" is: {answer}.")
        start = prompt.rfind(NEEDLE[:24], 0, place[0]) if place else -1
        if not place or start < 0:
            return ()
        spans.append((start, place[1]))
    return tuple(sorted(spans))


def _assignments(prompt: str, names: Sequence[str]) -> tuple[Span, ...]:
    """Where the variables get their values; none unless each does so in one place."""
    found = [list(re.finditer(rf"VAR {re.escape(name)} = (?:VAR )?\w+", prompt)) for name in names]
    if any(len(places) != 1 for places in found):
        return ()
    return tuple(sorted(place.span() for (place,) in found))
