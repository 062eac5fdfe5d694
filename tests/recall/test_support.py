"""Whether a text supports an answer, and the limit that says so."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_archive import retrieval

import ahn
from ahn.errors import ConfigError
from ahn.memory.calibration import Calibration
from ahn.recall import support
from ahn.recall.ask import held
from ahn.recall.passages import Passages
from ahn.recall.question import Question
from conftest import tiny, with_memory
from tiny_tokenizer import tiny_tokenizer

FILLER = "It was a day like any other day, and nobody said a thing about it. "
SECRET = "The captain hid the compass in a barrel of apples."


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    model = with_memory(tiny(vocab_size=len(tokenizer), max_position_embeddings=4096))
    model.ahn_retrieval = retrieval()
    return model


@pytest.fixture(scope="module")
def memory(model, tokenizer):
    text = f"{FILLER * 5}{SECRET} {FILLER * 8}{FILLER * 2}The rudder was lost."
    return ahn.read(model, ahn.Dialogue(tokenizer).open(text), archive="keys")


class TestSignals:
    def test_words_of_the_best_passage_and_of_all(self, model, memory, tokenizer):
        passages = Passages.of(memory.archive, tokenizer)
        where = [i for i, text in enumerate(passages.texts) if "compass" in text]

        def found(question, read):
            return support.of_passages(passages, read, Question(question, model, tokenizer, memory))

        assert found("the captain hid the compass", where)["words"] == 1
        assert found("zyxw vuts", where)["words"] == 0
        some = found("the captain hid the zyxw", where)["words"]
        assert 0.3 < some < 0.8  # "the" counts for little
        other = found("the captain and the rudder", where)
        both = found("the captain and the rudder", [*where, len(passages) - 1])
        assert both["words_all"] > both["words"] >= other["words"] == other["words_all"]

    def test_heads_look_at_the_best_passage(self, model, memory, tokenizer):
        from ahn.recall.finders import get

        passages = Passages.of(memory.archive, tokenizer)
        question = Question("Where is the compass?", model, tokenizer, memory)
        scores = get("heads")().scores(passages, question)
        found = support.of_passages(passages, [0, 2], question)
        assert found["heads_less"] == pytest.approx(math.log(max(scores[[0, 2]].max(), 1e-6)), abs=1e-4)
        assert found["heads"] >= found["heads_less"]

    def test_what_the_window_holds_counts(self, model, memory, tokenizer):
        passages = Passages.of(memory.archive, tokenizer)
        for window, last in ((16, False), (200, True)):
            found = held(passages, SimpleNamespace(config=memory.config.replace(window=window)))
            assert any("rudder" in passages.texts[i] for i in found) == last and len(found) < len(passages)
        assert support.of_passages(passages, [], Question("Where?", model, tokenizer, memory)) == {}

    def test_said(self, tokenizer):
        """All spellings are added up; nothing else counts."""
        yes, no = support._spellings(tokenizer)
        assert yes and no and not set(yes) & set(no)
        logits = torch.full((3, len(tokenizer)), 5.0)
        logits[0, yes], logits[0, no] = 2.0, 0.0
        logits[1, yes], logits[1, no] = 0.0, 2.0
        logits[2] = torch.randn(len(tokenizer))
        high, low, other = (row["said"] for row in support.said(tokenizer, logits))
        share = logits[2].softmax(0)
        assert high == pytest.approx(2 + math.log(len(yes) / len(no)), abs=1e-3)
        assert low == pytest.approx(-2 + math.log(len(yes) / len(no)), abs=1e-3)
        assert other == pytest.approx(math.log(share[yes].sum() / share[no].sum()), abs=1e-3)

    def test_a_tokenizer_that_cannot_tell_yes_from_no(self):
        class Letters:
            def __call__(self, forms, **options):
                return type("Encoded", (), {"input_ids": [[7] for _ in forms]})

        assert support.said(Letters(), torch.zeros(2, 9)) == [{}, {}]


def rows(rng, count, **means):
    return [{name: float(rng.normal(mean)) for name, mean in means.items()} for _ in range(count)]


class TestCalibration:
    def test_a_single_signal_that_is_as_good(self):
        rng = np.random.default_rng(0)
        yes, no = rows(rng, 300, said=3, words=0.2, heads=0), rows(rng, 300, said=0, words=0, heads=0)
        found = support.calibrate([yes], no)
        assert found.signals == ("said",) and found.weights == (1.0,)
        refused = sum(found.margin(row) < 0 for row in yes)
        assert refused == 15
        other = rows(rng, 2000, said=3, words=0.2, heads=0)
        assert 0.02 < sum(found.margin(row) < 0 for row in other) / 2000 < 0.09

    def test_several_where_they_are_better(self):
        rng = np.random.default_rng(0)
        yes, no = rows(rng, 400, said=1, words=1, heads=1), rows(rng, 400, said=0, words=0, heads=0)
        found = support.calibrate([yes], no)
        assert set(found.signals) == {"heads", "words", "said"} and min(found.weights) > 0
        assert max(found.weights) / min(found.weights) < 2
        areas = {one.signals: support.area(one, yes, no) for one in support.candidates([yes], no)}
        assert areas[found.signals] == max(areas.values()) and len(areas) == 4

    def test_the_threshold_holds_in_each_group(self):
        """Questions that ask for no passage may have low signals: none of the groups is refused more often."""
        rng = np.random.default_rng(0)
        facts, whole, no = rows(rng, 100, said=5), rows(rng, 100, said=2), rows(rng, 100, said=0)
        found = support.calibrate([facts, whole], no)
        assert [sum(found.margin(row) < 0 for row in group) for group in (facts, whole)] == [0, 5]

    def test_margin(self):
        found = Calibration(("said", "words"), (2.0, 1.0), 1.5)
        assert found.margin({"said": 1.0, "words": 0.5, "heads": 9.0}) == 1.0
        assert found.margin({"said": 0.0, "words": 0.5}) == -1.0
        assert found.margin({"said": 1.0}) is None
        assert Calibration.from_dict(json.loads(json.dumps(found.to_dict()))) == found

    @pytest.mark.parametrize(
        "values",
        [
            None,
            {},
            {"signals": [], "weights": [], "threshold": 0.0},
            {"signals": ["said"], "weights": [], "threshold": 0.0},
            {"signals": ["said"], "weights": [math.nan], "threshold": 0.0},
            {"signals": ["said"], "weights": ["1"], "threshold": 0.0},
            {"signals": [1], "weights": [1.0], "threshold": 0.0},
            {"signals": ["said"], "weights": [1.0], "threshold": None},
        ],
    )
    def test_refused(self, values):
        with pytest.raises(ConfigError):
            Calibration.from_dict(values)

    def test_nothing_to_calibrate_with(self):
        one = [{"said": 1.0}]
        for yes, no in (([], one), ([one], []), ([one, []], one)):
            with pytest.raises(ConfigError, match="expected questions with an answer in the text and without"):
                support.calibrate(yes, no)
        with pytest.raises(ConfigError, match="no signal that all 2 questions have"):
            support.calibrate([one], [{"words": 1.0}])
