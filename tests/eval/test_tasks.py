"""Tasks on generated texts and on a few small records in the benchmarks' own formats."""

import json
import lzma
import os
import random
import re
import sys
import types
import zipfile
from pathlib import Path

import pytest

from ahn.errors import ConfigError, EvalError
from ahn.eval import tasks
from ahn.eval.data import benchmark
from ahn.eval.records import read
from ahn.eval.ruler import needles
from ahn.eval.tasks.base import Example, Task, template_tokens
from ahn.registry import nearest
from tiny_tokenizer import tiny_tokenizer

SHARED = Path(os.environ.get("AHN_SHARED", Path(__file__).resolve().parents[3] / "shared"))
TOKENIZER = None


def tokenizer():
    global TOKENIZER
    TOKENIZER = TOKENIZER or tiny_tokenizer()
    return TOKENIZER


def shared(path):
    if not (SHARED / path).exists():
        pytest.skip(f"needs the samples of the benchmarks: {SHARED / path}")
    return SHARED / path


def examples(name, data=None, length=None, seed=0, limit=None):
    given = {"tokenizer": tokenizer(), "length": length, "data": data, "seed": seed, "limit": limit}
    return list(tasks.get(name).examples(**given))


def size(text):
    return len(tokenizer()(text, add_special_tokens=False).input_ids)


def whole(example):
    """Tokens that an example takes with the template and its answer."""
    return size(example.prompt + example.answer_prefix) + template_tokens(tokenizer()) + example.max_new_tokens


def shown(example):
    return example.prompt[slice(*example.evidence)]


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_bytes(lzma.compress(text.encode()) if path.suffix == ".xz" else text.encode())
    return path


PINNED = [
    "One of the special magic numbers for soft-collar is: 8220382.",
    "One of the special magic numbers for dizzy-walnut is: 1872743.",
    "One of the special magic numbers for sad-balcony is: 9924893.",
]
PINNED_ANSWER = "9924893"
LONG = {"input": "Who sat?", "context": "The old cat sat. " * 9, "answers": ["cat"], "all_classes": None, "_id": "x"}
ARTICLES = [
    {
        "title": f"Town {a}",
        "paragraphs": [
            {
                "context": f"Mayor m{a}x{p} rules street {p} of town {a}. " + "It is a long street. " * (p % 4 + 3),
                "qas": [{"question": f"Who rules street {p} of {a}?", "answers": [f"Mayor m{a}x{p}", f"m{a}x{p}"]}],
            }
            for p in range(12)
        ],
    }
    for a in range(4)
]
HOTPOT = [
    {
        "question": f"Which river is near town {n}?",
        "answer": f"River {n}",
        "context": [[f"Town {m}", [f"Town {m} is old. ", f"River {m} is near."]] for m in (n, n + 1, n + 2)],
        "supporting_facts": [[f"Town {n}", 1]],
    }
    for n in range(30)
]


# --- names


def test_every_set_of_the_suites_is_a_task():
    count = {suite: len(names) for suite, names in tasks.groups().items()}
    assert count["longbench"] == 21 and count["longbench/paper"] == 6
    assert (count["lveval"], count["infinitebench"], count["ruler"], count["ruler/niah"]) == (11, 6, 13, 8)
    assert len(set(tasks.names())) == len(tasks.names())
    for name in tasks.names():
        task = tasks.get(name)
        assert task.name == name and isinstance(task, Task)
        assert task.kind == "loss" or set(task.needs) <= {"jieba", "rouge"}


def test_groups_are_expanded_once():
    names = [task.name for task in tasks.expand(["longbench/paper", "longbench/qmsum", "ruler/vt"])]
    assert len(names) == 7 and names[-1] == "ruler/vt"


@pytest.mark.parametrize("name", ["longbench/hotpoqa", "longbensh/hotpotqa", "hotpotqa"])
def test_an_unknown_task_is_named_with_the_nearest(name):
    with pytest.raises(EvalError, match="'longbench/hotpotqa'|did you mean 'hotpotqa'"):
        tasks.get(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("niah", r"; did you mean 'ruler/niah'\?"),
        ("squad", r"; did you mean 'qa/squad', 'squad/spread', 'squad/0', ...\?"),
        ("SQuAD", r"; did you mean 'squad'\?"),
        ("ruler/nia", r"; did you mean 'ruler/niah', "),
        ("hotpot", r"; did you mean 'longbench/hotpotqa', 'lveval/hotpotwikiqa_mixup', 'qa/hotpotqa'\?"),
        ("books", "$"),
    ],
)
def test_what_can_be_meant(name, expected):
    assert re.match(expected, nearest(name, [*tasks.groups(), *tasks.names()]))


def test_adapters_that_begin_so_can_be_meant():
    names = ["other", "smollm2-135m-deltanet", "smollm2-135m-mamba2"]
    assert nearest("smollm2", names) == "; did you mean 'smollm2-135m-deltanet', 'smollm2-135m-mamba2'?"


def test_a_depth_of_squad_is_a_percentage():
    assert tasks.get("squad/37").name == "squad/37"
    with pytest.raises(EvalError, match="unknown set '101' of squad"):
        tasks.get("squad/101")


def test_a_suite_of_another_package(monkeypatch):
    class Mine(Task):
        suite, sets, metric = "mine", ("a",), "f1"

    monkeypatch.setattr(tasks._registry, "_loaders", {})
    tasks.register("mine", Mine)
    assert tasks.get("mine/a").name == "mine/a" and "mine/a" in tasks.names()


def test_settings_are_those_of_the_specification():
    for name in ("longbench", "lveval"):
        path = shared(f"spec/benchmarks/{name}.json")
        assert benchmark(name) == json.loads(path.read_text(encoding="utf-8"))


# --- benchmarks of fixed records


@pytest.mark.parametrize("name", [n for n in tasks.names() if n.startswith(("longbench/", "lveval/"))])
def test_prompts_are_the_benchmarks(tmp_path, name):
    suite, set_name = name.split("/")
    settings = benchmark(suite)[set_name]
    file = f"{set_name}_16k.jsonl" if suite == "lveval" else f"{set_name}.jsonl"
    record = LONG | {"context": "{The} cat.", "answer_keywords": "keys"}
    write(tmp_path / file, record)
    (example,) = examples(name, tmp_path, 16000)
    wanted = settings["prompt"].replace("{context}", "{The} cat.").replace("{input}", "Who sat?")
    assert example.prompt == wanted and example.max_new_tokens == settings["max_new_tokens"]
    continued = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert example.chat == (set_name not in continued)
    if suite == "lveval":
        assert example.extra["gold_ans"] == "keys"


def test_of_a_few_shot_answer_the_first_line_counts(tmp_path):
    write(tmp_path / "longbench-triviaqa.jsonl.xz", LONG)
    write(tmp_path / "hotpotqa.jsonl", LONG)
    (few,), (asked,) = examples("longbench/triviaqa", tmp_path), examples("longbench/hotpotqa", tmp_path)
    assert tasks.get("longbench/triviaqa").score(few, "\ncat\nQuestion: dog") == 1
    assert tasks.get("longbench/hotpotqa").score(asked, "\ncat\nQuestion: dog") == pytest.approx(1 / 2)


def test_lveval_scores_with_the_keywords_and_the_first_answer(tmp_path):
    task = tasks.get("lveval/hotpotwikiqa_mixup")
    write(
        tmp_path / "hotpotwikiqa_mixup_16k.jsonl", LONG | {"answers": ["the old cat", "dog"], "answer_keywords": "cat"}
    )
    (example,) = examples(task.name, tmp_path, 16384)
    assert task.score(example, "old cat") == 1
    assert task.score(example, "old") == task.score(example, "dog") == 0


def test_lveval_levels(tmp_path):
    for level in (16, 128):
        write(tmp_path / "cmrc_mixup" / f"cmrc_mixup_{level}k.jsonl", LONG | {"input": f"{level}k"})
    for length, level in ((None, 128), (128_000, 128), (131_072, 128), (16_000, 16)):
        (example,) = examples("lveval/cmrc_mixup", tmp_path, length)
        assert f"问题：{level}k" in example.prompt
    with pytest.raises(EvalError, match="length 8192: expected one of 16000, 32000"):
        examples("lveval/cmrc_mixup", tmp_path, 8192)


def test_the_paragraph_to_retrieve_is_the_evidence(tmp_path):
    for language, head in (("en", "Paragraph {}: "), ("zh", "段落{}：")):
        context = "\n\n".join(head.format(n) + f"text {n}" for n in range(1, 31))
        answer = head.format(2).strip(": ：")
        write(tmp_path / f"passage_retrieval_{language}.jsonl", LONG | {"context": context, "answers": [answer]})
        (example,) = examples(f"longbench/passage_retrieval_{language}", tmp_path)
        assert shown(example).strip() == head.format(2) + "text 2"


def test_an_answer_that_occurs_once_is_the_evidence(tmp_path):
    for context, evidence in (("a dog. a cat.", "cat"), ("a cat. a cat.", None), ("a dog.", None)):
        write(tmp_path / "multifieldqa_en.jsonl", LONG | {"context": context, "answers": ["cat."]})
        (example,) = examples("longbench/multifieldqa_en", tmp_path)
        assert (example.evidence and shown(example)) == evidence


def test_infinitebench(tmp_path):
    key = "The pass key is 81014. Remember it. 81014 is the pass key."
    lines = ["The grass is green."] * 20
    context = "\n".join([*lines[:5], key, *lines[5:], ""])
    write(tmp_path / "passkey.jsonl", {"input": "What is the pass key?", "context": context, "answer": "81014"})
    (example,) = examples("infinitebench/passkey", tmp_path)
    assert shown(example) == key and example.depth == pytest.approx(5 / 21, abs=0.05)
    assert example.prompt.endswith("What is the pass key?\n\nThe pass key is") and not example.chat
    assert tasks.get("infinitebench/passkey").score(example, " 81014.") == 1

    pairs = {f"key{n}": f"value{n}" for n in range(9)}
    record = {"input": "Key: key3", "context": json.dumps(pairs), "answer": ["value3"], "id": 4}
    write(tmp_path / "kv_retrieval.jsonl", record)
    (example,) = examples("infinitebench/kv_retrieval", tmp_path)
    assert shown(example) == "value3" and example.id == "4"

    record |= {"input": "Who?", "answer": ["two"], "options": ["one", "two", "three", "four"]}
    write(tmp_path / "longbook_choice_eng.jsonl", record)
    (example,) = examples("infinitebench/longbook_choice_eng", tmp_path)
    assert "\nA. one\nB. two\n" in example.prompt and example.answers == ("B", "two")
    assert [tasks.get("infinitebench/longbook_choice_eng").score(example, said) for said in ("B", "A")] == [1, 0]
    write(tmp_path / "longbook_choice_eng.jsonl", record | {"answer": ["five"]})
    with pytest.raises(EvalError, match="line 1: field 'options'.*'five'"):
        examples("infinitebench/longbook_choice_eng", tmp_path)


def test_truncation_takes_the_middle_and_says_if_the_evidence_went(tmp_path):
    words = [f"w{n}" for n in range(100)]
    for at, stays in ((10, True), (50, False), (90, True)):
        context = " ".join([*words[:at], "needle", *words[at:]])
        write(tmp_path / "multifieldqa_en.jsonl", LONG | {"context": context, "answers": ["needle"]})
        (full,) = examples("longbench/multifieldqa_en", tmp_path)
        (cut,) = examples("longbench/multifieldqa_en", tmp_path, length=400)
        assert size(full.prompt) > 400 >= size(cut.prompt) > 395
        assert cut.prompt[:150] == full.prompt[:150] and cut.prompt[-150:] == full.prompt[-150:]
        assert (cut.evidence is not None) == stays == ("evidence_cut" not in cut.extra)
        if stays:
            assert shown(cut) == "needle"
    assert tasks.get("longbench/multifieldqa_en").truncate(list(range(9)), 4) == [0, 1, 7, 8]


def test_a_limit_keeps_some_of_what_a_larger_one_keeps(tmp_path):
    write(tmp_path / "qmsum.jsonl", *(LONG | {"_id": str(n)} for n in range(20)))
    kept = [[e.id for e in examples("longbench/qmsum", tmp_path, seed=s, limit=n)] for s, n in ((0, 5), (0, 9), (1, 5))]
    assert set(kept[0]) < set(kept[1]) and kept[0] != kept[2] and kept[0] == sorted(kept[0], key=int)
    assert len(examples("longbench/qmsum", tmp_path)) == 20


# --- RULER


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in tasks.names() if n.startswith("ruler/")])
@pytest.mark.parametrize("length", [9000, 14000])
def test_ruler_fills_the_length_and_is_the_seeds(tmp_path, name, length):
    data = None
    if name.endswith("qa_1"):
        data = write(tmp_path / "squad.jsonl", *ARTICLES)
    elif name.endswith("qa_2"):
        data = write(tmp_path / "hotpotqa.jsonl", *HOTPOT)
    found = examples(name, data, length, limit=3)
    for example in found:
        assert 0.95 * length < whole(example) <= length
        assert len(example.answers) == len(set(example.answers)) and example.chat
    assert found == examples(name, data, length, limit=3)
    assert found[:2] == examples(name, data, length, limit=2)
    assert found != examples(name, data, length, seed=1, limit=3)


@pytest.mark.parametrize("name", [n for n in tasks.names() if n.startswith("ruler/niah")])
def test_needles_are_there_once_and_at_their_depth(name):
    for example in examples(name, length=8000, limit=8):
        task = tasks.get(name)
        for answer in example.answers:
            assert example.prompt.count(f"is: {answer}.") == 1 and f"is: {answer}." in shown(example)
        assert shown(example).startswith("One of the special magic ") and shown(example).endswith(".")
        first, last = example.prompt.index("\n"), example.prompt.rindex("\nWhat ")
        if example.depth is not None:
            assert shown(example).count("One of") == 1
            body = last - first - len(shown(example))
            assert (example.evidence[0] - first) / body == pytest.approx(example.depth, abs=0.05)
        assert task.score(example, "They are " + " and ".join(example.answers)) == 1
        assert task.score(example, example.answers[0]) == pytest.approx(1 / len(example.answers))
    kind = needles.SETS[name.removeprefix("ruler/")]
    assert len(example.answers) == kind.num_values * kind.num_asked


def test_what_is_drawn_is_the_same_on_any_machine():
    text = needles.niah(needles.SETS["niah_multikey_2"], [], random.Random("ruler/0"), 2)
    assert text.prompt.split("\n")[1:-1] == PINNED and text.answers == (PINNED_ANSWER,)


def test_depths_spread_over_the_whole_text():
    depths = [example.depth for example in examples("ruler/niah_single_1", length=1500, limit=60)]
    assert min(depths) < 0.1 and max(depths) > 0.9 and len(set(depths)) > 20


def test_the_chain_of_variables_can_be_followed():
    for example in examples("ruler/vt", length=6000, limit=4):
        shot, _, text = example.prompt.partition("\n\nMemorize")
        value = text.partition("assigned the value ")[2].partition(" ")[0]
        chain = [line.split() for line in shown(example).split("\n") if line.startswith("VAR")]
        assert chain[0] == ["VAR", example.answers[0], "=", value]
        assert [(line[1], line[-1]) for line in chain[1:]] == list(
            zip(example.answers[1:], example.answers, strict=False)
        )
        assert shot.count("VAR") == 9 and f"5 variables are assigned the value {value}" in example.answer_prefix


def test_common_and_frequent_words_are_the_answers():
    (example,) = examples("ruler/cwe", length=8000, limit=1)
    text = example.prompt.rpartition("Below is")[2].partition("\nQuestion")[0].partition("\n")[2]
    words = text.split()[1::2]
    assert {word for word in words if words.count(word) == 30} == set(example.answers) and len(example.answers) == 10
    assert {words.count(word) for word in words} == {3, 30}
    (example,) = examples("ruler/fwe", length=8000, limit=1)
    words = example.prompt.partition("coded words. ")[2].partition("\nQuestion")[0].split()
    ranked = sorted(set(words), key=words.count, reverse=True)
    assert ranked[0] == "..." and tuple(ranked[1:4]) == example.answers
    assert words.count(ranked[3]) > words.count(ranked[4])


def test_documents_of_the_questions(tmp_path):
    (example,) = examples("ruler/qa_1", write(tmp_path / "a.jsonl", *ARTICLES), 6000, limit=1)
    assert shown(example).startswith(example.answers[0])
    assert example.prompt.count(shown(example)) == 1
    assert tasks.get("ruler/qa_1").score(example, f"it is {example.answers[1]}") == 1
    (example,) = examples("ruler/qa_2", write(tmp_path / "b.jsonl", *HOTPOT), 6000, limit=1)
    assert shown(example).endswith(f"{example.answers[0]} is near.") and "Document 1:\n" in example.prompt


def test_essays_are_the_files_of_a_folder(tmp_path):
    (tmp_path / "b.txt").write_text("Second one. " * 3)
    (tmp_path / "a.txt").write_text("First one. " * 3)
    (example,) = examples("ruler/niah_single_2", tmp_path, 1500, limit=1)
    body = example.prompt.replace(shown(example), "").split("afterwards.\n")[1]
    assert body.split()[:2] == ["First", "one."] and "Second one." in body and "Lupin" not in body


def test_rulers_own_files(tmp_path):
    text = "A special magic number is hidden.\nOne of the special magic numbers for k is: 123.\nWhat is it?"
    prefix = " The special magic number for k mentioned in the provided text is"
    new = {"index": 7, "input": text, "outputs": ["123"], "answer_prefix": prefix}
    old = {"index": 8, "input": text + prefix, "outputs": ["123"]}
    write(tmp_path / "niah_single_1" / "validation.jsonl", new, old)
    first, second = examples("ruler/niah_single_1", tmp_path)
    assert (first.id, second.id) == ("7", "8")
    for example in (first, second):
        assert example.prompt == text and example.answer_prefix == prefix
        assert shown(example) == "One of the special magic numbers for k is: 123."


@pytest.mark.parametrize(("name", "length"), [("ruler/niah_single_1", 300), ("ruler/cwe", 500), ("squad/0", 100)])
def test_a_length_below_the_template_is_named(tmp_path, name, length):
    data = write(tmp_path / "squad.jsonl", *ARTICLES) if name == "squad/0" else None
    with pytest.raises(EvalError, match=rf"{name}: length {length}: expected at least \d+"):
        examples(name, data, length, limit=1)


# --- SQuAD and perplexity


def test_squad_puts_the_evidence_at_the_depth_asked(tmp_path):
    write(tmp_path / "squad-dev.jsonl", *ARTICLES)
    found = {depth: examples(f"squad/{depth}", tmp_path, 4000, limit=5) for depth in (0, 50, 80, 100)}
    for depth, at_depth in found.items():
        assert [e.id for e in at_depth] == [e.id for e in found[0]]
        for example in at_depth:
            assert 3500 < whole(example) <= 4000
            assert shown(example).startswith(example.answers[0])
            assert example.prompt.count(f"{example.answers[1]} ") == 1
            body = example.prompt.rindex("\n\nQuestion: ") - len(shown(example))
            assert example.evidence[0] / body == pytest.approx(depth / 100, abs=0.06)
            assert tasks.get("squad/0").score(example, example.answers[1]) == 1
    spread = examples("squad/spread", tmp_path, 4000, limit=21)
    assert [e.depth for e in spread] == pytest.approx([n / 20 for n in range(21)])


def test_squad_in_its_other_forms(tmp_path):
    def official(paragraph):
        qas = [qa | {"answers": [{"text": t, "answer_start": 0} for t in qa["answers"]]} for qa in paragraph["qas"]]
        return paragraph | {"qas": qas}

    whole_file = {"data": [a | {"paragraphs": [official(p) for p in a["paragraphs"]]} for a in ARTICLES]}
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(whole_file))
    rows = [
        {"title": a["title"], "context": p["context"], "question": qa["question"], "answers": {"text": qa["answers"]}}
        for a in ARTICLES
        for p in a["paragraphs"]
        for qa in p["qas"]
    ]
    given = examples("squad/50", write(tmp_path / "a.jsonl", *ARTICLES), 4000, limit=3)
    assert examples("squad/50", write(tmp_path / "b.jsonl", *rows), 4000, limit=3) == given
    assert examples("squad/50", tmp_path, 4000, limit=3) == given


def test_perplexity_takes_the_beginning_of_every_text_that_is_long_enough(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("The old cat sat. " * 50)
    (tmp_path / "b.md").write_text("Short.")
    write(tmp_path / "c.jsonl.xz", {"text": "The dog sat. " * 60, "title": "Dog"})
    found = examples("perplexity/text", tmp_path, length=100)
    assert sorted(e.id for e in found) == ["c.jsonl.xz/0", "deep/a.txt"]
    assert all(abs(size(e.prompt) - 100) <= 1 for e in found)
    drawn = [[e.id for e in examples("perplexity/text", tmp_path, length=100, seed=n, limit=1)] for n in range(6)]
    assert all(len(ids) == 1 for ids in drawn) and len({ids[0] for ids in drawn}) == 2
    assert len(examples("perplexity/pg19", tmp_path)) == 3
    with pytest.raises(EvalError, match="length 100000: the longest of 3 texts has"):
        examples("perplexity/text", tmp_path, length=100_000)
    with pytest.raises(EvalError, match="needs data"):
        examples("perplexity/text")
    with pytest.raises(EvalError, match="no answer to score"):
        tasks.get("perplexity/text").score(found[0], "a")


def test_other_json_in_a_folder_of_texts_is_skipped(tmp_path, caplog):
    write(tmp_path / "a.jsonl", {"text": "The old cat sat. " * 50})
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "b.txt").write_text("The dog. " * 50)
    foreign = {"ahn.json": "{}", "list.json": "[1, 2]", "config.json": '{"data": 3}', "no.json": "{", "e.jsonl": ""}
    for name, content in foreign.items():
        (tmp_path / name).write_text(content)
    assert [e.id for e in examples("perplexity/text", tmp_path)] == ["a.jsonl/0"]
    assert all(f"skipped {tmp_path / name}" in caplog.text for name in foreign)
    for name in foreign:  # asked for by name it is an error
        with pytest.raises(EvalError, match=name):
            examples("perplexity/text", tmp_path / name)
    write(tmp_path / "a.jsonl", {"text": "The cat."}, {"txt": "The dog."})
    with pytest.raises(EvalError, match="line 2: no field 'text'"):
        examples("perplexity/text", tmp_path)


def test_halves_of_surrogate_pairs_in_a_record_are_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "The \ud800 cat \ud83d\ude00.", "x": [{"\udcff": "\uDFFF"}]}' + "\n")
    (record,) = read(path)
    assert record.fields == {"text": "The \ufffd cat \U0001f600.", "x": [{"\ufffd": "\ufffd"}]}


# --- bad input


@pytest.mark.parametrize("name", ["longbench/qmsum", "ruler/niah_single_1", "perplexity/text", "squad/0"])
def test_missing_data_is_named(tmp_path, name):
    with pytest.raises(EvalError, match=f"nowhere: no such file or folder; expected the data of {name}"):
        examples(name, tmp_path / "nowhere", 6000)


@pytest.mark.parametrize("name", ["longbench/qmsum", "squad/0", "perplexity/text", "ruler/niah_single_2"])
def test_a_folder_without_the_data_is_named_with_what_was_expected(tmp_path, name):
    with pytest.raises(EvalError, match=rf"{tmp_path}: no .*(qmsum|squad|txt)"):
        examples(name, tmp_path, 6000)


def test_what_a_folder_has_instead_is_named(tmp_path):
    with pytest.raises(EvalError, match="there is no file"):
        examples("longbench/qmsum", tmp_path, 6000)
    (tmp_path / "longbench-samsum.jsonl").write_text("")
    with pytest.raises(EvalError, match=r"there is longbench-samsum\.jsonl"):
        examples("longbench/qmsum", tmp_path, 6000)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"input": "a", "answers": ["a"], "_id": "x"}, "no field 'context'; there are input, answers, _id"),
        (LONG | {"context": 3}, "field 'context' is int: expected text"),
        (LONG | {"answers": []}, "field 'answers': expected one or more texts"),
        ([1], "list: expected a record with fields"),
    ],
)
def test_a_bad_field_is_named_with_file_and_line(tmp_path, record, said):
    path = write(tmp_path / "qmsum.jsonl", LONG, record)
    with pytest.raises(EvalError, match=rf"{path}, line 2: {said}"):
        examples("longbench/qmsum", tmp_path)


@pytest.mark.parametrize(
    ("name", "record", "said"),
    [
        ("longbench/qmsum", LONG | {"dataset": "qasper"}, "line 1: of 'qasper': expected records of 'qmsum'"),
        ("longbench/trec", LONG | {"all_classes": 3}, "line 1: field 'all_classes': expected one or more texts"),
        ("longbench/trec", LONG | {"all_classes": ["a", 3]}, "line 1: field 'all_classes': expected one or more"),
        ("squad/0", {"paragraphs": 3}, "line 1: field 'paragraphs' is int"),
        ("squad/0", {"paragraphs": [{"context": "a"}]}, "line 1, paragraphs 1: no field 'qas'"),
        ("squad/0", {"context": "a", "question": "b", "answers": [3]}, "line 1: field 'answers': expected texts"),
        ("squad/0", {"context": "a", "question": "b", "answers": 3}, "line 1: field 'answers' is int"),
        ("ruler/qa_1", {"context": "a", "question": "b", "answers": []}, "no question that has an answer"),
        ("ruler/qa_2", {"context": [["a"]], "question": "b", "answer": "c"}, "line 1: fields 'context' and"),
    ],
)
def test_records_of_another_shape_are_named(tmp_path, name, record, said):
    with pytest.raises(EvalError, match=said):
        examples(name, write(tmp_path / "data.jsonl", record), 6000)


def test_keywords_that_are_no_text_are_named(tmp_path):
    source = write(tmp_path / "factrecall_en_16k.jsonl", LONG | {"answer_keywords": ["a"]})
    with pytest.raises(EvalError, match="line 1: field 'answer_keywords' is list"):
        examples("lveval/factrecall_en", source, 16_000)


def test_files_that_are_no_json_lines(tmp_path):
    path = tmp_path / "qmsum.jsonl"
    deep = b"[" * 200_000
    bad = ((b'{"a": 1}\n{"b"', "line 2: not JSON"), (b"", "no rec"), (b"\xff\xfe\x00", "be read"), (deep, "not JSON"))
    for content, said in bad:
        path.write_bytes(content)
        with pytest.raises(EvalError, match=said):
            examples("longbench/qmsum", tmp_path)
    (tmp_path / "x.jsonl.xz").write_bytes(b"no xz")
    with pytest.raises(EvalError, match="x.jsonl.xz: cannot be read"):
        list(read(tmp_path / "x.jsonl.xz"))


# --- the hub


def test_records_of_the_hub_are_read_from_its_archives(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as file:
        file.writestr("data/qmsum.jsonl", json.dumps(LONG) + "\n" + json.dumps(LONG | {"_id": "y"}))
    load, asked = datasets.load_dataset, []

    def local(path, data_files, **options):
        asked.append(data_files)
        return load(path, data_files=data_files.replace("hf://datasets/zai-org/LongBench", str(tmp_path)), **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setattr("huggingface_hub.dataset_info", lambda *_, **__: None)
    assert [e.id for e in examples("longbench/qmsum")] == ["x", "y"]
    assert asked == ["zip://**/qmsum.jsonl::hf://datasets/zai-org/LongBench/data.zip"]


def test_a_hub_that_cannot_be_reached_and_a_missing_library(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no route\nto host")

    def slow(**options):
        pytest.fail("the datasets library was asked, which retries for half a minute")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.dataset_info", unreachable)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=slow))
    message = "xinrongzhang2022/InfiniteBench/passkey.jsonl: cannot be loaded from the hub: no route; .* --data FOLDER"
    with pytest.raises(EvalError, match=message):
        examples("infinitebench/passkey")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(EvalError, match=message):  # after a look into the library's cache
        examples("infinitebench/passkey")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EvalError, match=r"needs the datasets library: pip install 'ahn\[eval\]'"):
        examples("lveval/lic_mixup")


# --- samples


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("longbench/multi_news", None),
        ("longbench/multifieldqa_zh", 4000),
        ("longbench/passage_retrieval_zh", None),
        ("infinitebench/passkey", 8192),
        ("infinitebench/passkey", 16384),
        ("ruler/niah_multikey_3", 4096),
    ],
)
def test_samples_of_the_benchmarks(name, length):
    folder = shared("data/benchmarks")
    task = tasks.get(name)
    for library in task.needs:
        pytest.importorskip(library)
    found = list(task.examples(tokenizer=tokenizer(), length=None, data=_file(folder, name, length), seed=0, limit=5))
    assert len(found) == 5 == len({example.id for example in found})
    for example in found:
        assert isinstance(example, Example) and task.score(example, example.answers[0]) == pytest.approx(1, abs=1e-6)
        if name.startswith(("infinitebench", "ruler")):
            assert example.answers[0] in shown(example)
        elif "retrieval" in name:
            assert shown(example).startswith(f"{example.answers[0]}：")


def _file(folder, name, length):
    suite, set_name = name.split("/")
    with_length = folder / f"{suite}-{set_name}-{length}.jsonl.xz"
    return with_length if with_length.exists() else folder


def test_errors_are_of_one_kind():
    assert not issubclass(EvalError, ConfigError) and issubclass(EvalError, ValueError)
