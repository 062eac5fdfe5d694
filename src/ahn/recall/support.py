"""Whether a text supports an answer to a question, judged before an answer is generated.

Signals are higher for questions that the text answers. Logarithms and shares are on scales that can be added up.

| signal | is |
|---|---|
| heads | log of the retrieval heads' attention to the best passage |
| heads_less | the same, less their attention for a question about nothing |
| words | share of the question's words that the best passage has, rare words first (the weights of BM25) |
| words_all | the same of all passages together |
| said | log-odds of yes against no, where the model is asked whether the text answers the question |

The passages are those that are read again, and those that the window or the sinks still hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch import Tensor

from ahn.errors import ConfigError
from ahn.memory.calibration import Calibration
from ahn.recall.finders.bm25 import Lexicon
from ahn.recall.finders.heads import looked_at, nothing
from ahn.recall.passages import Passages
from ahn.recall.question import Question
from ahn.recall.words import words

KINDS = ("heads", "heads_less"), ("words", "words_all"), ("said",)
REFUSED = 0.05  # largest share of the questions with an answer that may be refused
AS_GOOD = 0.01  # least gain in area under the curve for which several signals are used instead of one
CHECK = "Does the text above contain the answer to this question: {question} Answer yes or no."
_FLOOR = 1e-6  # least attention whose logarithm is a signal
_STEPS, _RIDGE = 20, 1.0  # Newton steps and ridge penalty of the logistic fit

Signals = Mapping[str, float]


def of_passages(passages: Passages, read: Sequence[int], question: Question) -> dict[str, float]:
    """The signals that passages give. `read`: those that the answer can be taken from, by number."""
    if not read:
        return {}
    found: dict[str, float] = {}
    if passages.archive.keys is not None:
        mine = looked_at(passages, question)
        less = mine - nothing(passages, question)
        best, best_less = (float(x[list(read)].max()) for x in (mine, less))
        found |= {"heads": math.log(max(best, _FLOOR)), "heads_less": math.log(max(best_less, _FLOOR))}
    lexicon = Lexicon.of(passages)
    weights = {word: lexicon.weight(word) for word in dict.fromkeys(words(question.asked))}
    if whole := sum(weights.values()):
        known = [weights.keys() & set(words(passages.texts[i])) for i in read]
        shares = [sum(weights[word] for word in one) / whole for one in [*known, set().union(*known)]]
        found |= {"words": max(shares[:-1]), "words_all": shares[-1]}
    return {name: round(value, 4) for name, value in found.items()}


def check(question: str) -> str:
    """The text that the model is asked in place of the question, for the signal `said`."""
    return CHECK.format(question=question.strip())


def said(tokenizer: Any, logits: Tensor) -> list[dict[str, float]]:
    """The signal of each row, of the logits [B, V] after `check`. None of a tokenizer that has no tokens to tell yes
    from no."""
    yes, no = _spellings(tokenizer)
    if not (yes and no):
        return [{} for _ in logits]
    logits = logits.float()
    odds = logits[:, yes].logsumexp(1) - logits[:, no].logsumexp(1)
    return [{"said": round(value, 4)} for value in odds.tolist()]


@lru_cache(maxsize=4)
def _spellings(tokenizer: Any) -> tuple[list[int], list[int]]:
    """First tokens of yes and of no, however they are written, without those that both have."""

    def first(word: str) -> set[int]:
        forms = [space + form for space in ("", " ") for form in (word, word.capitalize(), word.upper())]
        return {ids[0] for ids in tokenizer(forms, add_special_tokens=False, verbose=False).input_ids if ids}

    yes, no = first("yes"), first("no")
    return sorted(yes - no), sorted(no - yes)


def calibrate(
    answerable: Sequence[Sequence[Signals]], absent: Sequence[Signals], refused: float = REFUSED
) -> Calibration:
    """The best single signal, or several where they are better, and a threshold for them.

    Args:
        answerable: signals of questions that the text answers, in groups such as tasks: of none more than the share
            `refused` is refused. absent: of questions that it does not answer.

    Raises:
        ConfigError: a group without questions, or no signal that all of them have.
    """
    fitted = candidates(answerable, absent, refused)
    every = [row for group in answerable for row in group]
    areas = [area(one, every, absent) for one in fitted]
    single, several = max(range(len(fitted)), key=lambda i: (len(fitted[i].signals) == 1, areas[i])), len(fitted) - 1
    return fitted[several if areas[several] > areas[single] + AS_GOOD else single]


def candidates(
    answerable: Sequence[Sequence[Signals]], absent: Sequence[Signals], refused: float = REFUSED
) -> list[Calibration]:
    """Calibrations to choose from, each signal alone, then the best of each kind together; arguments as of
    `calibrate`."""
    every = [row for group in answerable for row in group]
    if not absent or not answerable or not all(answerable):
        raise ConfigError("calibration: expected questions with an answer in the text and without, in every group")
    known = [[name for name in kind if all(name in row for row in [*every, *absent])] for kind in KINDS]
    if not any(known):
        raise ConfigError(f"calibration: no signal that all {len(every) + len(absent)} questions have")
    best = [max(kind, key=lambda name: _area(_values(every, name), _values(absent, name))) for kind in known if kind]
    forms: list[tuple[tuple[str, ...], tuple[float, ...]]] = [((name,), (1.0,)) for kind in known for name in kind]
    if len(best) > 1:
        forms.append((tuple(best), _weights(every, absent, best)))
    return [_with_threshold(names, weights, answerable, refused) for names, weights in forms]


def area(calibration: Calibration, answerable: Sequence[Signals], absent: Sequence[Signals]) -> float:
    """Area under the curve: how often a question with an answer has more support than one without."""
    return _area(_margins(calibration, answerable), _margins(calibration, absent))


def _area(high: np.ndarray, low: np.ndarray) -> float:
    return float((high[:, None] > low).mean() + (high[:, None] == low).mean() / 2)


def _values(rows: Sequence[Signals], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], np.float64)


def _margins(calibration: Calibration, rows: Sequence[Signals]) -> np.ndarray:
    found = [margin for row in rows if (margin := calibration.margin(row)) is not None]
    return np.array(found, np.float64)


def _with_threshold(
    names: tuple[str, ...], weights: tuple[float, ...], answerable: Sequence[Sequence[Signals]], refused: float
) -> Calibration:
    free = Calibration(names, weights, 0.0)
    lowest = [np.sort(_margins(free, group))[int(refused * len(group))] for group in answerable]
    return Calibration(names, weights, float(min(lowest)))


def _weights(answerable: Sequence[Signals], absent: Sequence[Signals], names: Sequence[str]) -> tuple[float, ...]:
    """Of a logistic regression, by Newton's method; each signal in its own unit."""
    raw = np.array([[row[name] for name in names] for row in [*answerable, *absent]], np.float64)
    spread = raw.std(0)
    spread[spread == 0] = 1
    x = np.column_stack([(raw - raw.mean(0)) / spread, np.ones(len(raw))])
    y = np.repeat([1.0, 0.0], [len(answerable), len(absent)])
    share = np.where(y == 1, 0.5 / len(answerable), 0.5 / len(absent)) * len(y)  # both kinds count alike
    penalty = np.diag([_RIDGE] * len(names) + [0.0])
    w = np.zeros(x.shape[1])
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
        slope = x.T @ (share * (p - y)) + penalty @ w
        curve = (x * (share * p * (1 - p))[:, None]).T @ x + penalty + 1e-9 * np.eye(len(w))
        w -= np.linalg.solve(curve, slope)
    return tuple(round(float(value), 6) for value in w[:-1] / spread)
