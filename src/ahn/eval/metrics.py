"""Scores of an answer, 0 to 1: the metrics of LV-Eval, LongBench, InfiniteBench, RULER and SQuAD.

`score` is the way in. A metric takes a prediction and one answer, as the benchmarks' own do; how the scores over
several right answers become one is the suite's. Sources:

- SQuAD, arXiv 1606.05250: words without punctuation and articles.
- LongBench, arXiv 2308.14508, and LV-Eval, arXiv 2402.05136: their own scores are reproduced to 1e-6 in the tests.
- InfiniteBench, arXiv 2402.13718. Its book questions are scored by ROUGE-L as in the AHN paper (arXiv 2510.07318); the
  benchmark's own F1 are `qa_f1_score` and `qa_f1_zh_score`, the latter by characters.
- RULER, arXiv 2404.06654: the share of the answers that occur in the prediction; in QA, whether one does.
"""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from statistics import fmean
from typing import Any

from ahn.errors import EvalError
from ahn.eval.data import benchmark
from ahn.registry import did_you_mean

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PUNCTUATION_ZH = str.maketrans(
    "",
    "",
    string.punctuation
    + "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～"
    + "｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏",
)
_KEYWORD_RECALL_EN, _KEYWORD_RECALL_ZH = 0.2, 0.4  # LV-Eval: an answer with fewer of the keywords scores 0


@cache
def _stop_words(language: str) -> frozenset[str]:
    """LV-Eval's stop words. They do not count as keywords of an answer, and ROUGE leaves them out."""
    return frozenset(benchmark("lveval")["_stop_words"][language])


def normalize(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces (SQuAD)."""
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def normalize_zh(text: str) -> str:
    """Lower case, without punctuation and spaces."""
    return "".join(text.lower().translate(_PUNCTUATION_ZH).split())


def _overlap(said: Sequence[str], wanted: Sequence[str]) -> float:
    """Harmonic mean of precision and recall, tokens counted as often as they occur in both."""
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def qa_f1_score(prediction: str, answer: str) -> float:
    """Harmonic mean of the precision and recall of the answer's words."""
    return _overlap(normalize(prediction).split(), normalize(answer).split())


def qa_f1_score_with_gold_ans(prediction: str, answer: str, gold_ans: str | None) -> float:
    """F1, or 0 where too few of the answer's keywords `gold_ans` are said (LV-Eval)."""
    if gold_ans:
        keywords = normalize(gold_ans).split()
        if _recall(normalize(prediction).split(), keywords, _stop_words("en")) < _KEYWORD_RECALL_EN:
            return 0.0
    return qa_f1_score(prediction, answer)


def qa_f1_zh_score(prediction: str, answer: str) -> float:
    """F1 of the words that jieba finds."""
    return _overlap(_words_zh(prediction), _words_zh(answer))


def qa_f1_zh_score_with_gold_ans(prediction: str, answer: str, gold_ans: str | None) -> float:
    """The score for English answers with Chinese words. An answer without keywords is its own keyword."""
    said = _words_zh(prediction)
    if _recall(said, _words_zh(gold_ans or answer), _stop_words("zh")) < _KEYWORD_RECALL_ZH:
        return 0.0
    return _overlap(said, _words_zh(answer))


def qa_f1_characters(prediction: str, answer: str) -> float:
    """F1 of characters (InfiniteBench's Zh.QA)."""
    return _overlap(normalize_zh(prediction), normalize_zh(answer))


def _recall(said: Iterable[str], keywords: Sequence[str], stop: frozenset[str]) -> float:
    """Stop words count as keywords although they are never found, as in LV-Eval."""
    common = Counter(said) & Counter(keywords)
    return sum(n for word, n in common.items() if word not in stop) / len(keywords) if keywords else 0.0


def _words_zh(text: str) -> list[str]:
    return [word for word in map(normalize_zh, _cut(text)) if word]


def _cut(text: str) -> list[str]:
    return list(_library("jieba").cut(text))


def exact_match_score(prediction: str, answer: str) -> float:
    return float(normalize(prediction) == normalize(answer))


def rouge_score(prediction: str, answer: str) -> float:
    """F of ROUGE-L; 0 where there is nothing to compare, and where a sentence is too long for the library's recursion
    (which the benchmarks also score 0)."""
    try:
        return float(_library("rouge").Rouge(["rouge-l"]).get_scores(prediction, answer)[0]["rouge-l"]["f"])
    except (ValueError, RecursionError):
        return 0.0


def rouge_zh_score(prediction: str, answer: str) -> float:
    return rouge_score(" ".join(_cut(prediction)), " ".join(_cut(answer)))


def rouge_zh_score_blacklist(prediction: str, answer: str) -> float:
    """ROUGE-L without stop words. Words are cut twice, the second time with spaces between them (LV-Eval)."""

    def words(text: str) -> str:
        cut = map(normalize_zh, _cut(" ".join(_cut(text))))
        return " ".join(word for word in cut if word not in _stop_words("zh"))

    return rouge_score(words(prediction), words(answer))


def classification_score(prediction: str, answer: str, all_classes: Sequence[str]) -> float:
    """1 / the number of classes named, if the right one is among them.

    A class that is part of the right one's name does not count; the class after one so left out always does, for the
    benchmark takes them out of the list it walks through.
    """
    named = [name for name in all_classes if name in prediction]
    at = 0
    while at < len(named):
        if named[at] in answer and named[at] != answer:
            named.remove(named[at])
        at += 1
    return 1 / len(named) if answer in named else 0.0


def count_score(prediction: str, answer: str) -> float:
    """The share of the numbers in the prediction that are the answer."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval_score(prediction: str, answer: str) -> float:
    """`count_score` of the number in "Paragraph 7"."""
    return count_score(prediction, _number_after("Paragraph ", answer))


def retrieval_zh_score(prediction: str, answer: str) -> float:
    return count_score(prediction, _number_after("段落", answer))


def _number_after(word: str, answer: str) -> str:
    found = re.search(rf"{word}(\d+)", answer)
    if not found:
        raise EvalError(f"answer {answer!r}: expected {word!r} and a number")
    return found[1]


def code_sim_score(prediction: str, answer: str) -> float:
    """Similarity of the first line that is neither comment nor fence, in whole percent.

    The ratio is difflib's, which is fuzzywuzzy's without python-Levenshtein and gives LongBench's numbers; that of
    Levenshtein and rapidfuzz is another one.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100 if line and answer else 0.0


def first_number_score(prediction: str, answer: str) -> float:
    """Whether the first number in the prediction is the answer (InfiniteBench's pass key and number string)."""
    found = re.search(r"[0-9]+", prediction)
    return float(found is not None and found[0] == answer)


def word_score(prediction: str, answer: str) -> float:
    """Whether the answer is one of the prediction's words (InfiniteBench's KV retrieval)."""
    return float(answer in re.sub(r"[\n:\"'.,?!{}]", " ", prediction).split())


def choice_score(prediction: str, answer: str) -> float:
    """Whether the option is chosen (InfiniteBench's En.MC); `answer` is its letter or its text.

    The first letter said counts if it is A to D, else what follows "answer is" and the like, else the first word that
    is such a letter.
    """
    if prediction[:1] in tuple("ABCD"):
        return float(prediction[0] == answer)
    said = re.sub(r" +", " ", re.sub(r"[\n\"'.,?!{}]", " ", prediction))
    for phrase in ("answer is:", "answer:", "answer is", "option is"):
        if (at := said.find(phrase)) >= 0:
            return float(said[at + len(phrase) + 1 :].startswith(answer))
    return float(next((word for word in said.split() if word in "ABCD"), None) == answer)


def contains_score(prediction: str, answer: str) -> float:
    """Whether the answer occurs, in any case of letters (RULER)."""
    return float(answer.lower() in prediction.lower())


def best(metric: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    return max(metric(prediction, answer) for answer in answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
    return best(qa_f1_score, prediction, answers)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    return best(exact_match_score, prediction, answers)


def _first(scores: Sequence[float]) -> float:
    return scores[0]


@dataclass(frozen=True)
class Metric:
    """`function(prediction, answer)`, or with a third argument where `takes` names one of `score`'s.

    needs: libraries it imports. over: makes one score of those over several right answers.
    """

    function: Callable[..., float]
    needs: tuple[str, ...] = ()
    takes: str | None = None
    over: Callable[[Sequence[float]], float] = max


_LONGBENCH = {
    "qa_f1_score": Metric(qa_f1_score),
    "qa_f1_zh_score": Metric(qa_f1_zh_score, ("jieba",)),
    "rouge_score": Metric(rouge_score, ("rouge",)),
    "rouge_zh_score": Metric(rouge_zh_score, ("jieba", "rouge")),
    "classification_score": Metric(classification_score, takes="all_classes"),
    "retrieval_score": Metric(retrieval_score),
    "retrieval_zh_score": Metric(retrieval_zh_score),
    "count_score": Metric(count_score),
    "code_sim_score": Metric(code_sim_score),
}
_LVEVAL = {
    "qa_f1_score": Metric(qa_f1_score, over=_first),
    "qa_f1_score_with_gold_ans": Metric(qa_f1_score_with_gold_ans, takes="gold_ans", over=_first),
    "qa_f1_zh_score": Metric(qa_f1_zh_score, ("jieba",), over=_first),
    "qa_f1_zh_score_with_gold_ans": Metric(qa_f1_zh_score_with_gold_ans, ("jieba",), "gold_ans", _first),
    "rouge_score": Metric(rouge_score, ("rouge",), over=_first),
    "rouge_zh_score": Metric(rouge_zh_score, ("jieba", "rouge"), over=_first),
    "rouge_zh_score_blacklist": Metric(rouge_zh_score_blacklist, ("jieba", "rouge"), over=_first),
}
_INFINITEBENCH = {
    "rouge_score": Metric(rouge_score, ("rouge",)),
    "rouge_zh_score": Metric(rouge_zh_score, ("jieba", "rouge")),
    "qa_f1_score": Metric(qa_f1_score),
    "qa_f1_zh_score": Metric(qa_f1_characters),
    "first_number_score": Metric(first_number_score),
    "word_score": Metric(word_score),
    "choice_score": Metric(choice_score),
}
METRICS: dict[str, dict[str, Metric]] = {
    "longbench": _LONGBENCH,
    "lveval": _LVEVAL,
    "infinitebench": _INFINITEBENCH,
    "ruler": {
        "string_match_all": Metric(contains_score, over=fmean),
        "string_match_part": Metric(contains_score),
    },
    "squad": {"f1": Metric(qa_f1_score), "exact_match": Metric(exact_match_score)},
    "qa": {"f1": Metric(qa_f1_score), "rouge": _LONGBENCH["rouge_score"]},
}


def find(suite: str, name: str) -> Metric:
    """Raises EvalError with the nearest name if there is no such suite or metric."""
    if suite not in METRICS:
        raise EvalError(f"unknown suite {suite!r}: {did_you_mean(suite, METRICS)}")
    if name not in METRICS[suite]:
        raise EvalError(f"unknown metric {name!r} of {suite}: {did_you_mean(name, METRICS[suite])}")
    return METRICS[suite][name]


def score(
    suite: str,
    metric: str,
    prediction: str,
    answer: str | Sequence[str],
    gold_ans: str | None = None,
    all_classes: Sequence[str] | None = None,
) -> float:
    """The score of `prediction`, 0 to 1.

    Args:
        suite, metric: see `METRICS`.
        answer: the right one, or several: LongBench, InfiniteBench and SQuAD take the best, LV-Eval the first, RULER's
            `string_match_all` the mean.
        gold_ans: the answer's keywords (LV-Eval).
        all_classes: names of the classes; `classification_score` needs them.

    Raises:
        EvalError: an unknown suite or metric, an answer that is none, or a library that is not installed.
    """
    found = find(suite, metric)
    answers = [answer] if isinstance(answer, str) else answer
    if not answers:
        raise EvalError(f"{suite} {metric}: no answer to compare with")
    extra: tuple[Any, ...] = ()
    if found.takes == "gold_ans":
        extra = (gold_ans,)
    elif found.takes == "all_classes":
        if not all_classes:
            raise EvalError(f"{suite} {metric}: needs all_classes")
        extra = (all_classes,)
    return float(found.over([found.function(prediction, one, *extra) for one in answers]))


def check_libraries(names: Iterable[str]) -> None:
    """Raises EvalError, naming the extra to install, if one of the libraries cannot be imported."""
    for name in names:
        _library(name)


@cache
def _library(name: str) -> Any:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise EvalError(f"{name} is not installed, which this metric needs: pip install 'ahn[eval]'") from error
    if name == "jieba":
        module.setLogLevel("WARNING")
    return module
