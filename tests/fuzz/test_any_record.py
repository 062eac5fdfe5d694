"""Files of evaluation data with anything in them: refused, or examples that can be asked and scored."""

import json
import lzma

import pytest
from damage import damaged, edits, values
from effort import bounded, fuzz
from hypothesis import given
from hypothesis import strategies as st

from ahn.errors import EvalError
from ahn.eval import tasks

RECORDS = {
    "longbench/trec": {"_id": "a", "context": "b", "input": "c", "answers": ["d"], "all_classes": ["d", "e"]},
    "longbench/multifieldqa_en": {"_id": "a", "context": "b d", "input": "c", "answers": ["d"], "dataset": None},
    "lveval/hotpotwikiqa_mixup": {
        "context": "b", "input": "c", "answers": ["d"], "answer_keywords": "d", "length": 1, "confusing_facts": ["x"],
    },
    "infinitebench/longbook_choice_eng": {"id": 1, "context": "b", "input": "c", "answer": ["d"], "options": [*"abcd"]},
    "infinitebench/kv_retrieval": {"id": 1, "context": '{"k": "d"}', "input": "c", "answer": ["d"]},
    "squad/answers": {
        "title": "t", "paragraphs": [{"context": "b d", "qas": [{"id": "1", "question": "q", "answers": [{"text": "d", "answer_start": 2}]}]}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    from tiny_tokenizer import make

    return make()
