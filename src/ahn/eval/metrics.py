"""How good an answer is, 0 to 1. English only.

A metric takes a prediction and one answer and is called as LongBench and LV-Eval call it; `best` is over the answers
that are all right.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces (SQuAD)."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def qa_f1_score(prediction: str, answer: str) -> float:
    """Harmonic mean of the precision and recall of the answer's words."""
    said, wanted = normalize(prediction).split(), normalize(answer).split()
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def exact_match_score(prediction: str, answer: str) -> float:
    return float(normalize(prediction) == normalize(answer))


def best(metric: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    return max(metric(prediction, answer) for answer in answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
    return best(qa_f1_score, prediction, answers)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    return best(exact_match_score, prediction, answers)
