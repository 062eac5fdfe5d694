"""Where text, question and evidence are in the prompts of all tasks, and that it changes none of their ids."""

import hashlib
import json
from dataclasses import replace
from itertools import pairwise

import pytest

from ahn.dialogue import Dialogue
from ahn.eval import tasks
from ahn.eval.prompts import encode
from ahn.eval.tasks import ruler
from ahn.eval.tasks.base import Example
from tiny_tokenizer import tiny_tokenizer

NAMES = [name for name in tasks.names() if tasks.get(name).kind == "generate" and not name.endswith("-absent")]
NOT_ASKED = {f"longbench/{name}" for name in ("gov_report", "multi_news", "vcsum", "passage_count", "trec", "triviaqa")}
NOT_ASKED |= {f"longbench/{name}" for name in ("samsum", "lsht", "lcc", "repobench-p")}
CHINESE = "从前有一只猫。它住在河边的小屋里。" * 40 + "那只猫的名字叫阿福。" + "它每天都去钓鱼。" * 40
ENGLISH = "The old cat sat on a mat. " * 40 + "The name of the cat was Mortimer. " + "Mice came and went.\n" * 40
TITLES = ["Whitby", "Saltburn", "Staithes", "Runswick"]


def length_of(name):
    return 16_000 if name.startswith("lveval/") else 2600 if name.startswith(("ruler/", "squad/", "qa/")) else None


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")

    def write(name, *records):
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")

    english = {"context": ENGLISH, "input": "What was the cat called?", "answers": ["Mortimer"], "_id": "e"}
    chinese = {"context": CHINESE, "input": "那只猫叫什么名字？", "answers": ["阿福"], "_id": "c"}
    for name in NAMES:
        suite, set_name = name.split("/")
        if suite == "longbench":
            write(set_name, english, chinese)
        elif suite == "lveval":
            write(f"{set_name}_16k", english, chinese)
    for language, head in (("en", "Paragraph {}: "), ("zh", "段落{}：")):
        context = "\n\n".join(head.format(n) + f"Town {n} has {n} bells." for n in range(1, 31))
        answer = head.format(9).strip(": ：")
        write(f"passage_retrieval_{language}", english | {"context": context, "answers": [answer]})
    book = {"context": ENGLISH, "input": "What was the cat called?", "answer": ["Mortimer"], "id": 1}
    for name in ("longbook_qa_eng", "longbook_qa_chn"):
        write(name, book)
    write("longbook_choice_eng", book | {"options": ["Tom", "Mortimer", "Felix", "Ann"]})
    key = "The pass key is 81014. Remember it. 81014 is the pass key."
    write(
        "passkey", book | {"context": f"{ENGLISH}{key}\n{ENGLISH}", "input": "What is the pass key?", "answer": "81014"}
    )
    digits = "The sequence of digits is 9182736450. Remember it. 9182736450 is the sequence of digits."
    asked = {"input": "What is the sequence of digits?", "answer": "9182736450"}
    write("number_string", book | asked | {"context": f"{ENGLISH}{digits}\n{ENGLISH}"})
    pairs = json.dumps({f"key{n}": f"value{n}" for n in range(200)}, indent=0)
    write("kv_retrieval", book | {"context": pairs, "input": 'Key: "key33"', "answer": "value33"})

    def paragraph(town, p):
        text = f"Mayor m{town}x{p} rules street {p} of {TITLES[town]}. " + "It is a long street. " * (p % 4 + 3)
        return {"context": text, "qas": [{"question": f"Who rules street {p}?", "answers": [f"Mayor m{town}x{p}"]}]}

    articles = [{"title": TITLES[t], "paragraphs": [paragraph(t, p) for p in range(12)]} for t in range(4)]
    write("squad-dev", *articles)
    stories = [{"id": str(t), **paragraph(t, 1)} for t in range(4)]
    write("fairytaleqa-valid", *stories)
    write("qmsum-valid", *stories)
    passages = [
        f"Passage 1:\n{t}\nA town.\nPassage 2:\nOther\nNone.\nPassage 3:\nSea\n{t} is by the sea.\n" for t in TITLES
    ]
    hops = [english | {"input": t, "context": p} for t, p in zip(TITLES, passages, strict=True)]
    write("musique-train100", *(hop | {"supporting": [0, 2]} for hop in hops))
    write("hotpotqa-train100", *(hop | {"supporting": [hop["input"], "Sea"]} for hop in hops))
    context = [[[t, [f"{t} is old. ", f"River {t} is near."]] for t in (a, b)] for a, b in pairwise(TITLES)]
    facts = [
        {"question": "Which?", "answer": "River", "context": c, "supporting_facts": [[c[0][0], 1]]} for c in context
    ]
    (folder / "hotpot").mkdir()
    lines = "\n".join(map(json.dumps, facts))
    (folder / "hotpot" / "hotpotqa.jsonl").write_text(lines)
    return folder


def made(name, data, tokenizer, length=None, limit=3):
    data = {"ruler/qa_1": data / "squad-dev.jsonl", "ruler/qa_2": data / "hotpot"}.get(name, data)
    data = None if name.startswith("ruler/") and "qa" not in name else data
    given = {"tokenizer": tokenizer, "length": length or length_of(name), "data": data, "seed": 0, "limit": limit}
    return list(tasks.get(name).examples(**given))


def digest(examples, tokenizer):
    found = hashlib.sha256()
    for example in examples:
        found.update(encode(tokenizer, example, Dialogue(tokenizer)).ids.tobytes())
    return found.hexdigest()[:8]


IDS = {  # as they were before prompts said where a question begins: results must stay comparable
    "infinitebench/longbook_qa_eng": "137160fc",
    "infinitebench/longbook_qa_chn": "137160fc",
    "infinitebench/longbook_choice_eng": "74d01389",
    "infinitebench/passkey": "6b59e5b7",
    "infinitebench/number_string": "4973c0ba",
    "infinitebench/kv_retrieval": "966c8bb5",
    "longbench/narrativeqa": "6491e38a",
    "longbench/qasper": "38bfd80a",
    "longbench/multifieldqa_en": "d1ad4311",
    "longbench/multifieldqa_zh": "084bbdad",
    "longbench/hotpotqa": "8c91a97c",
    "longbench/2wikimqa": "8c91a97c",
    "longbench/musique": "8c91a97c",
    "longbench/dureader": "664699f9",
    "longbench/gov_report": "7a8ccb0c",
    "longbench/qmsum": "51d9c7fa",
    "longbench/multi_news": "8b8186b0",
    "longbench/vcsum": "99de214f",
    "longbench/trec": "9f870336",
    "longbench/triviaqa": "6102e252",
    "longbench/samsum": "3fabb457",
    "longbench/lsht": "fff6a4fd",
    "longbench/passage_retrieval_en": "9d0c96d4",
    "longbench/passage_count": "94b0b9c7",
    "longbench/passage_retrieval_zh": "3202d966",
    "longbench/lcc": "fc7ae494",
    "longbench/repobench-p": "e1318a6b",
    "lveval/hotpotwikiqa_mixup": "5431eea4",
    "lveval/loogle_SD_mixup": "90a016df",
    "lveval/loogle_CR_mixup": "90a016df",
    "lveval/loogle_MIR_mixup": "90a016df",
    "lveval/multifieldqa_en_mixup": "90a016df",
    "lveval/multifieldqa_zh_mixup": "cc437030",
    "lveval/factrecall_en": "daf3b5be",
    "lveval/factrecall_zh": "93b71498",
    "lveval/cmrc_mixup": "9bb94d16",
    "lveval/lic_mixup": "56302c16",
    "lveval/dureader_mixup": "9bb94d16",
    "qa/squad": "471dd027",
    "qa/fairytaleqa": "d5d1d5b6",
    "qa/musique": "1838d7a9",
    "qa/hotpotqa": "b3630814",
    "qa/qmsum": "516fe65b",
    "ruler/niah_single_1": "8386625d",
    "ruler/niah_single_2": "e98ddc22",
    "ruler/niah_single_3": "0193debd",
    "ruler/niah_multikey_1": "16627449",
    "ruler/niah_multikey_2": "4e4f8ba7",
    "ruler/niah_multikey_3": "64776faa",
    "ruler/niah_multivalue": "89d35a06",
    "ruler/niah_multiquery": "6c3cd30f",
    "ruler/vt": "ee29c5f9",
    "ruler/cwe": "e267f4b7",
    "ruler/fwe": "1caaf149",
    "ruler/qa_1": "38a9287e",
    "ruler/qa_2": "f17d7aab",
    "squad/spread": "1d5509bb",
    "squad/0": "1d129ce7",
    "squad/25": "9a7c7131",
    "squad/50": "3a082300",
    "squad/75": "3309bbcd",
    "squad/100": "d5043825",
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_the_same_ids_as_before(name, data, tokenizer):
    assert digest(made(name, data, tokenizer), tokenizer) == IDS[name]


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("pre_tokenizer", ["gpt2", "qwen", "metaspace"])
@pytest.mark.parametrize(
    "name",
    [
        "ruler/niah_multiquery",
        "ruler/vt",
        "longbench/multifieldqa_zh",
        "longbench/qasper",
        "lveval/cmrc_mixup",
        "squad/50",
        "infinitebench/passkey",
        "infinitebench/longbook_choice_eng",
    ],
)
def test_text_question_and_evidence_are_found_in_tokens(name, pre_tokenizer, template, data):
    """With tokens that go over the end of the text, and without a template behind the question."""
    tokenizer = tiny_tokenizer(pre_tokenizer, **({} if template else {"template": None}))
    for example in made(name, data, tokenizer, limit=2):
        if pre_tokenizer == "metaspace" and not example.prompt.isascii():
            continue  # it has no such tokens
        prompt = encode(tokenizer, example)
        bare = encode(tokenizer, replace(example, asks=None, needs=()))
        assert prompt.ids == bare.ids and prompt.evidence == bare.evidence
        assert bare.asks is None
        assert 0 <= prompt.begins < prompt.asks < len(prompt.ids)
        text, asked = (
            tokenizer.decode(prompt.ids[prompt.begins : prompt.asks]),
            tokenizer.decode(prompt.ids[prompt.asks :]),
        )
        assert text.strip()[:-3] in example.prompt[example.begins : example.asks] and len(text) > 1000
        assert example.prompt[example.asks :].strip() in asked and example.question in asked
        assert len(prompt.needs) == len(example.needs)
        for fact, places in zip(prompt.needs, example.needs, strict=True):
            for (start, end), place in zip(fact, places, strict=True):
                shown = tokenizer.decode(prompt.ids[start:end])
                assert example.prompt[slice(*place)] in shown and len(shown) < place[1] - place[0] + 8
                assert prompt.begins <= start < end <= prompt.asks


@pytest.mark.parametrize("name", NAMES)
def test_what_is_asked_about_a_text_and_where_its_facts_are(name, data, tokenizer):
    for example in made(name, data, tokenizer):
        assert (example.asks is None) == (name in NOT_ASKED)
        if example.asks is None:
            assert not example.question and not example.needs
            continue
        asked = example.prompt[example.asks :]
        assert example.question and example.question in asked and not example.question.startswith("Question")
        assert asked == asked.lstrip() and example.prompt[: example.asks].rstrip() != example.prompt[: example.asks]
        assert 0 <= example.begins < example.asks
        for fact in example.needs:
            assert fact and all(example.begins <= start < end <= example.asks for start, end in fact)


FACTS = {
    "niah_single_1": 1, "niah_single_2": 1, "niah_single_3": 1, "niah_multikey_1": 1, "niah_multikey_2": 1,
    "niah_multikey_3": 1, "niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 0, "fwe": 0, "qa_1": 1, "qa_2": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", ruler.Ruler.sets)
def test_facts_of_ruler(name, data, tokenizer, tmp_path):
    found = made(f"ruler/{name}", data, tokenizer, limit=2)
    for example in found:
        shown = [example.prompt[slice(*place)] for (place, *_) in example.needs]
        assert len(shown) == FACTS[name]
        if "niah" in name:
            assert all(any(f"is: {answer}." in text for text in shown) for answer in example.answers)
            assert example.question.startswith("What ") and example.question.endswith("mentioned in the provided text?")
        elif name == "vt":
            assert [text.split()[1] for text in shown] == list(example.answers)
            assert (
                example.question
                == f"Find all variables that are assigned the value {shown[0].split()[-1]} in the text above."
            )
        elif name == "qa_1":
            assert {example.prompt[slice(*place)] for place in example.needs[0]} == {example.answers[0]}
        elif name == "qa_2":
            assert shown[0].endswith("is near.")
    records = [
        {"input": e.prompt, "outputs": e.answers, "answer_prefix": e.answer_prefix, "index": e.id} for e in found
    ]
    own = tmp_path / "validation.jsonl"
    own.write_text("\n".join(map(json.dumps, records)))
    for ours, theirs in zip(found, tasks.get(f"ruler/{name}").examples(
        tokenizer=tokenizer, length=None, data=own, seed=0, limit=None), strict=True):  # fmt: skip
        assert (ours.begins, ours.asks, ours.question) == (theirs.begins, theirs.asks, theirs.question)
        shown = [[[e.prompt[slice(*place)].strip() for place in fact] for fact in e.needs] for e in (ours, theirs)]
        assert shown[1] == ([] if name.startswith("qa") else shown[0])


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_truncation_moves_what_is_asked_and_drops_facts_that_it_cuts(place, tokenizer):
    text = [f"Line {n} is dull." for n in range(100)]
    text.insert(int(place * 100), "The cat is Mortimer.")
    first = "Read this.\n\n"
    body = " ".join(text)
    prompt = f"{first}{body}\n\nQuestion: Who is the cat?"
    spans = [(at, at + 8) for at in (prompt.index("Mortimer"),)]
    dull = prompt.index("Line 97")
    example = Example(
        "x", prompt, ("Mortimer",), True, 8, spans[0], asks=prompt.index("Question"), question="Who is the cat?",
        needs=((spans[0],), ((spans[0]), (dull, dull + 7))), begins=len(first),
    )  # fmt: skip
    cut = tasks.get("longbench/qasper").shorten(example, tokenizer, 400)
    assert cut.prompt[cut.asks :] == "Question: Who is the cat?" and cut.prompt[: cut.begins] == first
    shown = [[cut.prompt[slice(*span)] for span in fact] for fact in cut.needs]
    if place == 0.5:
        assert shown == [["Line 97"]] and cut.evidence is None and cut.extra["evidence_cut"]
    else:
        assert shown == [["Mortimer"], ["Mortimer", "Line 97"]] and "evidence_cut" not in cut.extra


@pytest.mark.parametrize("chat", [True, False])
def test_a_question_in_front_of_the_text_leaves_a_token_to_answer_behind(chat, tokenizer):
    prompt = "Who sat?\n\nThe old cat sat."
    example = Example("x", prompt, ("cat",), chat, 4, asks=len(prompt), question="Who sat?", begins=10)
    found = encode(tokenizer, example)
    assert found.asks < len(found.ids) and tokenizer.decode(found.ids[found.begins : found.asks]).startswith("The old")
    behind = tokenizer.decode(found.ids[found.asks :])
    assert behind == ("<|end|>\n<|assistant|>\n" if chat else ".")
