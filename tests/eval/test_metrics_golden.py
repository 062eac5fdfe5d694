"""Scores of the benchmarks' own code (tests/golden/metrics.jsonl.xz), and metrics that it does not cover."""

import json
import lzma
import sys

import pytest

from ahn.errors import EvalError
from ahn.eval import metrics
from conftest import GOLDEN


def golden():
    with lzma.open(GOLDEN / "metrics.jsonl.xz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize(
    ("suite", "metric"),
    [
        *(
            ("longbench", name)
            for name in metrics.METRICS["longbench"]
            if name not in ("qa_f1_zh_score", "retrieval_zh_score")
        ),
        *(("lveval", name) for name in metrics.METRICS["lveval"] if name not in ("rouge_score", "rouge_zh_score")),
    ],
)
def test_scores_are_the_benchmarks_own(suite, metric):
    for name in metrics.find(suite, metric).needs:
        pytest.importorskip(name)
    cases = [case for case in golden() if (case["suite"], case["metric"]) == (suite, metric)]
    assert len(cases) >= 50
    for case in cases:
        given = {key: value for key, value in case.items() if key != "score"}
        assert metrics.score(**given) == pytest.approx(case["score"], abs=1e-6), case


@pytest.mark.parametrize(
    ("suite", "metric", "prediction", "answer", "score"),
    [
        ("longbench", "retrieval_zh_score", "段落2或段落12", "段落2", 1 / 2),
        ("longbench", "retrieval_zh_score", "没有", "段落2", 0),
        ("longbench", "code_sim_score", "```python\n# sum\nx = 1\ny = 2", "x = 1", 1),
        ("longbench", "qa_f1_score", "Spanish", ["French", "Spanish"], 1),
        ("lveval", "qa_f1_score", "Spanish", ["French", "Spanish"], 0),
        ("infinitebench", "first_number_score", "It is 81014, not 5.", "81014", 1),
        ("infinitebench", "first_number_score", "5, not 81014", "81014", 0),
        ("infinitebench", "first_number_score", "none", "81014", 0),
        ("infinitebench", "word_score", 'The value is "a-b".', "a-b", 1),
        ("infinitebench", "word_score", "a-bc", "a-b", 0),
        ("infinitebench", "choice_score", "B. the cat", ["B", "the cat"], 1),
        ("infinitebench", "choice_score", "A", ["B", "the cat"], 0),
        ("infinitebench", "choice_score", "the answer is: the cat", ["B", "the cat"], 1),
        ("infinitebench", "choice_score", "the answer is", ["B", "the cat"], 0),
        ("infinitebench", "choice_score", "I choose B", ["B", "the cat"], 1),
        ("infinitebench", "choice_score", "", ["B", "the cat"], 0),
        ("infinitebench", "qa_f1_zh_score", "小猫。", "猫", 2 / 3),
        ("ruler", "string_match_all", "CATS, dogs", ["cats", "cows"], 1 / 2),
        ("ruler", "string_match_part", "CATS, dogs", ["cats", "cows"], 1),
        ("squad", "f1", "the old cat", ["dog", "a cat"], 2 / 3),
    ],
)
def test_other_metrics(suite, metric, prediction, answer, score):
    assert metrics.score(suite, metric, prediction, answer) == pytest.approx(score)


def test_a_class_within_the_right_ones_name_does_not_count():
    classes = ["Number", "City", "Number of something"]
    given = {"prediction": "Number of something", "answer": "Number of something", "all_classes": classes}
    assert metrics.score("longbench", "classification_score", **given) == 1


@pytest.mark.parametrize(
    ("suite", "metric", "answer", "said"),
    [
        ("longbnch", "f1", "a", "unknown suite 'longbnch'.*did you mean 'longbench'"),
        ("longbench", "rouge_scor", "a", "unknown metric 'rouge_scor' of longbench.*did you mean 'rouge_score'"),
        ("longbench", "qa_f1_score", [], "no answer"),
        ("longbench", "classification_score", "a", "needs all_classes"),
        ("longbench", "retrieval_score", "seven", "'seven': expected 'Paragraph ' and a number"),
    ],
)
def test_what_cannot_be_scored_is_named(suite, metric, answer, said):
    with pytest.raises(EvalError, match=said):
        metrics.score(suite, metric, "a", answer)


def test_a_missing_library_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge", None)
    metrics._library.cache_clear()
    with pytest.raises(EvalError, match=r"rouge is not installed.*ahn\[eval\]"):
        metrics.check_libraries(["rouge"])
