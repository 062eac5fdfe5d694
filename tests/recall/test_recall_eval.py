"""Questions on long texts, and policies that read passages again."""

import json
from dataclasses import replace

import pytest

from ahn.dialogue import NOT_FOUND, Dialogue
from ahn.errors import ConfigError, EvalError
from ahn.eval import policies
from ahn.eval.batches import read_apart
from ahn.eval.kept import Kept
from ahn.eval.prompts import encode
from ahn.eval.tasks import get
from ahn.eval.tasks.base import Example
from ahn.eval.work import Job
from ahn.recall import Recall
from ahn.recall.passages import Passages
from made_articles import FILLER, NAMES, article
from tiny_base import SINKS, WINDOW, write_base
from tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")

    def write(name, records):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))

    write("squad-dev", [{"title": str(i), "paragraphs": [article(word)]} for i, word in enumerate(NAMES)])
    write("squad-train", [{"title": "t", "paragraphs": [{"context": f"{i} {FILLER}", "qas": []} for i in range(60)]}])
    write("fairytaleqa-valid", [{"id": str(i), **article(word)} for i, word in enumerate(NAMES)])
    passages = lambda a, b: "".join(f"Passage {i + 1}:\n{t}\n{FILLER}\n" for i, t in enumerate([a, "Other", b]))  # noqa: E731
    hop = {"answers": ["yes"], "_id": "x"}
    write(
        "hotpotqa-train100",
        [hop | {"input": w, "context": passages(w, w + "2"), "supporting": [w, w + "2"]} for w in NAMES],
    )
    write(
        "musique-train100", [hop | {"input": w, "context": passages(w, w + "2"), "supporting": [0, 2]} for w in NAMES]
    )
    write("qmsum-valid", [{"meeting": "m", **article("vote")}])
    return folder


def examples(data, name, length=700, limit=None):
    tokenizer = tiny_tokenizer()
    task = get(f"qa/{name}")
    found = list(task.examples(tokenizer=tokenizer, length=length, data=data, seed=0, limit=limit))
    return found, [encode(tokenizer, one, Dialogue(tokenizer)) for one in found], tokenizer


@pytest.mark.parametrize("name", ["squad", "fairytaleqa", "musique", "hotpotqa", "qmsum"])
def test_prompts_say_where_text_question_and_evidence_are(data, name):
    found, prompts, tokenizer = examples(data, name)
    assert len({one.id for one in found}) == len(found) > 0
    for one, prompt in zip(found, prompts, strict=True):
        dialogue, document = Dialogue(tokenizer), one.prompt[: one.asks].strip()
        assert prompt.text.tolist() == dialogue.open(document)[0].tolist()
        assert (
            prompt.ids[prompt.asks :].tolist()
            == dialogue.question(one.prompt[one.asks :].partition(": ")[2])[0].tolist()
        )
        assert tokenizer.decode(prompt.ids[prompt.begins : prompt.begins + 5]) == tokenizer.decode(
            prompt.ids[prompt.begins : prompt.begins + 5]
        ) and document.startswith(tokenizer.decode(prompt.ids[prompt.begins : prompt.begins + 5]).strip())
        assert len(prompt.ids) <= 700
        assert prompt.needs
        for fact in prompt.needs:
            for start, end in fact:
                text = tokenizer.decode(prompt.ids[start:end])
                assert one.question in text if name in ("musique", "hotpotqa") else one.answers[0].split()[-1] in text


def test_other_lengths_ask_the_same_questions(data):
    few = {one.id for one in examples(data, "squad", 500, 4)[0]}
    many = {one.id for one in examples(data, "squad", 900, 4)[0]}
    assert len(few) == len(many) == 4 and few & many


def test_longer_texts_are_filled_up(data):
    found, prompts, _ = examples(data, "squad", 3000)
    assert len({one.prompt[: one.asks] for one in found}) == 1
    assert 2500 < len(prompts[0].ids) <= 3000
    assert {one.question for one in found} == {f"Where was the {word}?" for word in NAMES}


@pytest.mark.parametrize("name", ["squad", "fairytaleqa"])
def test_questions_without_an_answer_in_the_text(data, name):
    found, prompts, _ = examples(data, f"{name}-absent", 700)
    texts = {one.prompt[: one.asks] for one in found}
    assert texts <= {one.prompt[: one.asks] for one in examples(data, name, 700)[0]} and len(texts) > 1
    for one, prompt in zip(found, prompts, strict=True):
        assert one.answers == (NOT_FOUND,) and one.evidence is None and prompt.needs == ()
        word = one.question.removesuffix("?").split()[-1]
        assert word in NAMES and word not in one.prompt[: one.asks]
    assert len({one.id for one in found}) == len(found)
    assert examples(data, f"{name}-absent", 700)[0] == found
    few = examples(data, f"{name}-absent", 700, 3)[0]
    assert len(few) == 3 and all(one in found for one in few)


def test_an_answer_that_occurs_is_not_absent(tmp_path):
    """Nor is a question of the same article, which may be in two texts."""

    def paragraph(text, *answers):
        asked = [{"question": f"{answer} {i}?", "answers": [answer]} for i in range(9) for answer in answers]
        return {"context": f"{FILLER * 5}{text}", "qas": asked}

    articles = [
        [paragraph("Under the anchorstone.", "ELSEWHERE", "zebra")],
        [paragraph(f"Elsewhere {i}.", "UNDER the anchorstone") for i in range(2)],
        [paragraph("the end")],  # of a text that is left out
    ]
    records = [{"title": str(i), "paragraphs": paragraphs} for i, paragraphs in enumerate(articles)]
    (tmp_path / "squad-dev.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert len({one.prompt[: one.asks] for one in examples(tmp_path, "squad", 700)[0]}) == 3
    found, _, _ = examples(tmp_path, "squad-absent", 700)
    assert found and all("zebra" in one.question and "Elsewhere" in one.prompt for one in found)


def test_missing_data(data, tmp_path):
    with pytest.raises(EvalError, match="--data"):
        list(get("qa/squad").examples(tokenizer=tiny_tokenizer(), length=None, data=None, seed=0, limit=1))
    with pytest.raises(EvalError, match="squad-dev.jsonl"):
        list(get("qa/squad").examples(tokenizer=tiny_tokenizer(), length=None, data=tmp_path, seed=0, limit=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"), positions=4096)


@pytest.fixture(scope="module")
def make(folder):
    base, adapter = folder

    def made(name, **changes):
        kept = Kept(WINDOW, SINKS, **({"adapter": adapter, "recall": Recall(120)} | changes))
        return policies.get(name)(base, kept, device="cpu")

    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "window", "recall", "rag", "rag-random", "rag-true"])
def test_questions_on_one_text_are_answered_as_alone(name, data, make):
    found, prompts, _ = examples(data, "squad", 700, 4)
    found, prompts = (
        x for x in ([f for f in found if f.prompt[: f.asks] == found[0].prompt[: found[0].asks]], prompts)
    )
    prompts = prompts[: len(found)]
    policy = make(name)
    together = policy.asked(list(zip(prompts, found, strict=True)))
    alone = [policy.asked([pair])[0] for pair in zip(prompts, found, strict=True)]
    assert together == alone


@pytest.mark.parametrize("name", ["full", "window"])
def test_without_recall_it_is_the_answer_to_the_whole_prompt(name, data, make):
    found, prompts, _ = examples(data, "squad", 700, 2)
    policy = make(name)
    ((answer, _),) = policy.asked([(prompts[0], found[0])])
    assert answer == policy.generate(prompts[0].ids, found[0].max_new_tokens)


def test_what_is_noted(data, make):
    found, prompts, _ = examples(data, "squad", 700, 1)
    for name, evidence in (("recall", 1.0), ("rag", 1.0), ("rag-true", 1.0)):
        ((_, note),) = make(name).asked([(prompts[0], found[0])])
        assert note["found"] == evidence and 0 < note["recalled"] <= 120
        assert set(note["found_by_budget"]) == {"256", "512", "1024"} and 0 < note["overlap"] <= 1
        assert set(note["support"]) == {"words", "words_all", "said"}
        assert 0 < note["support"]["words"] <= note["support"]["words_all"] <= 1


def test_what_is_read_again(data, make):
    """The true passage in front of the question, behind the template alone."""
    found, prompts, _ = examples(data, "squad", 700, 1)
    word = found[0].answers[0]
    for name in ("rag", "recall"):
        policy, seen = make(name), []
        after = policy.after
        policy.after = lambda cache, rows, limits, after=after, seen=seen: (
            seen.append((cache, rows)) or after(cache, rows, limits)
        )
        policy.asked([(prompts[0], found[0])])
        ((_, (row,)),) = seen
        text = policy.tokenizer.decode(row)
        assert word in text and text.index(word) < text.index(found[0].question)
        assert text.startswith("<|begin|>")
        memory = policy.document(prompts[0])
        assert memory.tokens_seen == prompts[0].asks and len(Passages.of(memory.archive, policy.tokenizer)) > 3


def test_settings_tell_policies_apart(folder):
    kept = Kept(WINDOW, SINKS, folder[1])
    settings = [
        policies.get("recall").settings(replace(kept, recall=recall))
        for recall in (Recall(), Recall(256), Recall(finder="bm25"), Recall(rounds=2))
    ]
    assert len({json.dumps(one, default=str) for one in settings}) == 4
    assert policies.get("rag").settings(kept) == policies.get("rag").settings(replace(kept, adapter=None))


@pytest.mark.parametrize("recall", [Recall(0), Recall(finder="embeddings")])
def test_refused(folder, recall):
    with pytest.raises(ConfigError):
        policies.get("recall")(folder[0], Kept(WINDOW, SINKS, recall=recall), device="cpu")


@pytest.mark.parametrize("name", ["recall", "rag"])
def test_prompts_with_instructions_in_front_and_one_question(name, make):
    """What is read in front of the passages, and what behind them, is all of the prompt but the text."""
    text = "".join(f"The {word} was under the {word}stone. {FILLER}" for word in NAMES * 2)
    instruction = "Read the text. " + "Say where it was. " * 9 + "\n\n"
    prompt = f"{instruction}{text}\n\nQuestion: Where was the anchor?"
    asks, at = prompt.index("Question"), prompt.index("under the anchorstone")
    needs = (((at, at + len("under the anchorstone")),),)
    example = Example(
        "x",
        prompt,
        ("under",),
        True,
        4,
        asks=asks,
        question="Where was the anchor?",
        needs=needs,
        begins=len(instruction),
    )
    encoded, policy, rows = encode(tiny_tokenizer(), example), make(name), []
    after = policy.after
    policy.after = lambda cache, given, limits: rows.extend(given) or after(cache, given, limits)
    ((_, note),) = policy.asked([(encoded, example)])
    ((row,), tokenizer) = rows, policy.tokenizer
    front = tokenizer.decode(encoded.ids[: encoded.begins])
    said = tokenizer.decode(row)
    assert front.endswith(instruction) and said.startswith(front)
    assert said.endswith(tokenizer.decode(encoded.ids[encoded.asks :])) and "anchorstone" in said
    assert note["found"] == 1.0 and said.count("Question: Where") == 1
    assert said.count("Read the text.") == 1, "instructions are no passage"


def test_only_policies_that_recall_read_text_and_question_apart(make):
    example = Example("x", "The cat sat.\n\nWho sat?", ("cat",), True, 4, asks=14, question="Who sat?")
    prompt = encode(tiny_tokenizer(), example)
    for apart in (False, True):
        job = Job(None, replace(example, apart=apart), prompt, None)
        assert [read_apart(job, policies.get(name).recalls) for name in ("window", "full", "recall", "rag")] == [
            apart, apart, True, True,
        ]  # fmt: skip
