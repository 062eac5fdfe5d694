"""Files of evaluation data with anything in them: refused, or examples that can be asked and scored."""

import json
import lzma

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ahn.errors import EvalError
from ahn.eval import tasks
from damage import damaged, edits, values
from effort import bounded, fuzz
from tiny_tokenizer import tiny_tokenizer

pytestmark = pytest.mark.slow

QUESTION = {"id": "1", "question": "q", "answers": [{"text": "d", "answer_start": 2}]}
RECORDS = {
    "longbench/trec": {"_id": "a", "context": "b", "input": "c", "answers": ["d"], "all_classes": ["d", "e"]},
    "longbench/multifieldqa_en": {"_id": "a", "context": "b d", "input": "c", "answers": ["d"], "dataset": None},
    "lveval/hotpotwikiqa_mixup": {
        "context": "b", "input": "c", "answers": ["d"], "answer_keywords": "d", "length": 1, "confusing_facts": ["x"],
    },
    "infinitebench/longbook_choice_eng": {"id": 1, "context": "b", "input": "c", "answer": ["d"], "options": [*"abcd"]},
    "infinitebench/kv_retrieval": {"id": 1, "context": '{"k": "d"}', "input": "c", "answer": ["d"]},
    "perplexity/text": {"text": "a b c"},
    "squad/50": {"title": "t", "paragraphs": [{"context": "b d", "qas": [QUESTION]}]},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def check(name, data, folder, tokenizer, suffix):
    path = folder / f"data{suffix}"
    path.write_bytes(lzma.compress(data) if suffix.endswith(".xz") else data)
    task = tasks.get(name)
    with bounded(folder, EvalError):
        for example in task.examples(tokenizer=tokenizer, length=None, data=path, seed=0, limit=2):
            assert task.shorten(example, tokenizer, 50).prompt
            if task.kind == "generate":
                assert 0 <= task.score(example, example.answers[0]) <= 1
    path.unlink()


@pytest.fixture(params=RECORDS)
def name(request):
    return request.param


@fuzz(25)
@given(data=st.data(), suffix=st.sampled_from([".json", ".jsonl", ".jsonl.xz"]))
def test_records(name, tmp_path, tokenizer, data, suffix):
    records = [RECORDS[name], data.draw(edits(RECORDS[name]) | values)]
    if ".jsonl" in suffix:
        text = "\n".join(map(json.dumps, records))
    else:
        text = json.dumps(records if data.draw(st.booleans()) else {"data": records})
    check(name, text.encode(), tmp_path, tokenizer, suffix)


@fuzz(12)
@given(data=st.data(), suffix=st.sampled_from([".json", ".jsonl", ".jsonl.xz", ".txt", ""]))
def test_bytes(name, tmp_path, tokenizer, data, suffix):
    good = json.dumps([RECORDS[name]] if suffix == ".json" else RECORDS[name]).encode()
    check(name, data.draw(damaged(good) | st.binary(max_size=40)), tmp_path, tokenizer, suffix)
