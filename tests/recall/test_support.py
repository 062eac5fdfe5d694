"""Whether a text supports an answer, and the limit that says so."""

import dataclasses
import io
import json
import math
import sys

import numpy as np
import pytest
import torch

import ahn
from ahn import cli
from ahn.adapter_files import read_adapter, write_adapter
from ahn.errors import AdapterError, ConfigError
from ahn.memory.calibration import Calibration
from ahn.recall import Recall, as_text, search, support
from ahn.recall.passages import Passages
from ahn.recall.question import Question
from conftest import retrieval, tiny, with_memory
from tiny_base import write_base
from tiny_tokenizer import tiny_tokenizer

FILLER = "It was a day like any other day, and nobody said a thing about it. "
SECRET = "The captain hid the compass in a barrel of apples."


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    model = with_memory(tiny(vocab_size=len(tokenizer), max_position_embeddings=4096), window=360)
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

    def test_no_passage(self, model, memory, tokenizer):
        passages = Passages.of(memory.archive, tokenizer)
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


SMALL = ("--window", "150", "--sinks", "8")
ALWAYS, NEVER = (Calibration(("said", "words"), (1.0, 1.0), limit) for limit in (-1e6, 1e6))


@pytest.fixture
def calibrated(model):
    """Sets the calibration of the model."""

    def calibrate(calibration):
        model.ahn_retrieval = dataclasses.replace(model.ahn_retrieval, calibration=calibration)

    yield calibrate
    calibrate(None)


class TestAsk:
    @pytest.fixture
    def asked(self, model, memory, tokenizer):
        def ask(*args, **options):
            question = "Where did the captain hide the compass?"
            return ahn.ask(model, tokenizer, memory, question, *args, max_new_tokens=4, do_sample=False, **options)

        return ask

    def test_without_a_calibration_nothing_is_refused(self, asked):
        answer = asked()
        assert answer.support is None and answer.found and answer.sources

    def test_an_answer_that_nothing_supports(self, asked, calibrated, memory, tokenizer):
        plain, seen = asked(), memory.tokens_seen
        calibrated(NEVER)
        answer = asked()
        assert answer.text == str(answer) == ahn.NOT_FOUND and not answer.found and answer.support < 0
        assert tokenizer.decode(answer.ids) == ahn.NOT_FOUND and answer.ids.dtype == torch.int64
        assert answer.sources == plain.sources
        guess = asked(unsupported="answer")
        assert guess.ids.tolist() == plain.ids.tolist() and not guess.found and guess.support == answer.support
        assert memory.tokens_seen == seen == len(memory.archive)

    def test_a_supported_answer_is_as_before(self, asked, calibrated):
        plain = asked()
        calibrated(ALWAYS)
        answer = asked()
        assert answer.text == plain.text and answer.found and answer.support > 0

    def test_a_signal_that_is_not_known_refuses_nothing(self, asked, calibrated):
        calibrated(Calibration(("of a later version",), (1.0,), 1e6))
        assert asked().found
        calibrated(NEVER)
        assert asked(0).support is None  # without passages it is what it was

    @pytest.mark.parametrize("chat", [False, True])
    def test_said_is_asked_where_the_answer_comes_from(self, calibrated, model, memory, tokenizer, chat):
        """Of the passages alone; in a chat, of the memory and the passages."""
        calibrated(Calibration(("said",), (2.0,), 0.5))
        question, dialogue = "Where did the captain hide the compass?", ahn.Dialogue(tokenizer)
        found = search(model, tokenizer, memory, question, Recall(200), prompt=dialogue.question if chat else None)
        text, passages = support.check(question), as_text(found.sources)
        assert passages.startswith("Passages from the text:") and "compass" in passages
        if chat:
            ids, cache = dialogue.question(text, passages), memory.fork()
            cache.set_archive(None)
        else:
            ids, cache = torch.cat([dialogue.open(passages), dialogue.question(text)], 1), ahn.AHNCache(model)
        logits = ahn.read(model, ids, cache).last_logits
        assert found.support == pytest.approx(2 * support.said(tokenizer, logits)[0]["said"] - 0.5, abs=1e-3)

    @pytest.mark.parametrize("chat", [False, True])
    def test_what_the_window_still_holds_supports_an_answer(self, tokenizer, chat):
        """A chat reads none of it again."""
        short = tiny(vocab_size=len(tokenizer), max_position_embeddings=4096)
        ahn.augment(short, ahn.AHNConfig(None, 1200, 4))
        short.ahn_retrieval = dataclasses.replace(retrieval(), calibration=Calibration(("words",), (1.0,), 0.9))
        dialogue = ahn.Dialogue(tokenizer)
        memory = ahn.read(short, dialogue.open(f"{FILLER}{SECRET} {FILLER}"), archive="keys")
        found = [
            search(short, tokenizer, memory, question, Recall(200), prompt=dialogue.question if chat else None)
            for question in ("the captain hid the compass", "the sextant of the zyxw")
        ]
        assert [one.supported for one in found] == [True, False]
        assert any(one.sources for one in found) != chat

    def test_refused(self, asked):
        with pytest.raises(ConfigError, match="unsupported='guess': expected one of say, answer"):
            asked(unsupported="guess")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base, and adapters that refuse nothing and everything."""
    folder = tmp_path_factory.mktemp("base")
    base, adapter = write_base(folder, positions=4096)
    found = read_adapter(adapter)
    names = []
    for name, calibration in (("plain", None), ("always", ALWAYS), ("never", NEVER)):
        found.retrieval = dataclasses.replace(retrieval(), calibration=calibration)
        write_adapter(found, folder / name)
        names.append(str(folder / name))
    return base, *names


class TestAdapter:
    def test_a_calibration_is_kept_with_the_heads(self, folders):
        base, plain, _, never = folders
        assert read_adapter(plain).retrieval.calibration is None
        assert "calibration" not in read_adapter(plain).retrieval.to_dict()
        assert read_adapter(never).retrieval.calibration == NEVER
        assert ahn.from_pretrained(base, never, device="cpu").ahn_retrieval.calibration == NEVER
        # memories that were read before it was calibrated stay usable
        assert read_adapter(plain).retrieval.digest == read_adapter(never).retrieval.digest

    def test_a_damaged_one(self, folders, tmp_path):
        write_adapter(read_adapter(folders[3]), tmp_path / "a")
        path = tmp_path / "a" / "ahn.json"
        settings = json.loads(path.read_text())
        for value in (7, {"signals": ["said"], "weights": [1.0]}, {"signals": [], "weights": [], "threshold": 0}):
            settings["retrieval"]["calibration"] = value
            path.write_text(json.dumps(settings))
            with pytest.raises(AdapterError, match="expected"):
                read_adapter(tmp_path / "a")


class TestCommands:
    @pytest.fixture
    def run(self, folders, tmp_path, capsys):
        book = tmp_path / "book.txt"
        book.write_text(f"{FILLER * 5}{SECRET} {FILLER * 8}")

        def call(command, adapter, *more):
            options = ["--document", str(book), "--base", folders[0], "--adapter", adapter, "--max-new-tokens", "4"]
            assert cli.main([command, *options, "--device", "cpu", *SMALL, *more]) == 0
            return capsys.readouterr()

        return call

    def test_ask(self, folders, run):
        _, plain, always, never = folders
        question = "Where is the compass?"
        (expected, _), (same, _) = run("ask", plain, question), run("ask", always, question)
        assert expected == same
        out, err = run("ask", never, question, "--sources")
        assert out == f"{ahn.NOT_FOUND}\n" and "--guess answers anyway" in err and "[1]" in err
        assert "answer  nothing generated\n" in err
        out, err = run("ask", never, question, "--guess")
        assert out == expected and "this answer is a guess" in err
        assert run("ask", never, question, "--recall", "0").out != f"{ahn.NOT_FOUND}\n"

    def test_chat(self, folders, run, monkeypatch):
        def talk(adapter, *more):
            monkeypatch.setattr(sys, "stdin", io.StringIO("Where is the compass?\nWho had it?\n"))
            return run("chat", adapter, *more)

        out, err = talk(folders[3])
        assert out == f"{ahn.NOT_FOUND}\n" * 2 and err.count("--guess answers anyway") == 2
        assert err.count("nothing generated; cache") == 2 and "tokens/s" not in err.partition("--guess")[2]
        assert talk(folders[3], "--guess").out == talk(folders[1]).out

    def test_a_chat_about_nothing_refuses_nothing(self, folders, monkeypatch, capsys):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Where is the compass?\nWho had it?\n"))
        options = ["--base", folders[0], "--adapter", folders[3], "--max-new-tokens", "4", "--device", "cpu"]
        assert cli.main(["chat", *options]) == 0
        assert ahn.NOT_FOUND not in capsys.readouterr().out

    def test_a_refusal_is_part_of_a_chat(self, folders, tokenizer):
        """The memory goes on as if the words had been generated."""
        from ahn.cli._session import Session
        from ahn.recall import not_found

        session = Session(cli._parse(["chat", "--base", folders[0], "--adapter", folders[3], "--device", "cpu"]))
        first, said = ahn.Dialogue(tokenizer).start("Who?"), not_found(tokenizer)
        answer = session.say(first)
        assert answer.ids.tolist() == [said.tolist()]
        session.answer(ahn.Dialogue(tokenizer).turn("Where?", said), 2)
        whole = [*first[0].tolist(), *said.tolist(), *ahn.Dialogue(tokenizer).turn("Where?", said)[0].tolist()]
        assert session.cache.archive.ids[: len(whole)].tolist() == whole
