import pytest

from ahn.dialogue import Dialogue
from ahn.eval.squad import contexts
from tiny_tokenizer import tiny_tokenizer

RECORDS = [
    {
        "paragraphs": [
            {
                "context": f"Cat {a}.{p} sat. " + "The (old) cat sat. " * (p % 3 + 1),
                "qas": [{"question": f"Who is {a}.{p}?", "answers": [f"Cat {a}.{p}"]}],
            }
            for p in range(20)
        ]
    }
    for a in range(3)
]


@pytest.mark.parametrize("pre_tokenizer", ["gpt2", "qwen"])
def test_contexts_are_of_one_length_and_say_where_answers_are(pre_tokenizer):
    tokenizer = tiny_tokenizer(pre_tokenizer)
    found = contexts(RECORDS, tokenizer, length=400, count=3)
    assert [len(context.ids) for context in found] == [400] * 3
    assert found[0].ids[:3].tolist() == Dialogue(tokenizer).open("a")[0, :3].tolist()
    asked = [question.text for context in found for question in context.questions]
    assert len(asked) == len(set(asked)) > 20
    for context in found:
        for question in context.questions:
            text = tokenizer.decode(context.ids[question.start : question.end])
            assert text.strip().startswith(question.answers[0]) and text.strip().endswith("cat sat.")


def test_questions_behind_the_window_and_within_it():
    (context,) = contexts(RECORDS, tiny_tokenizer(), length=600, count=1)
    behind, within = context.behind(sinks=50, window=200), context.within(window=200, room=60)
    assert behind and within
    assert all(q.start >= 50 and q.end <= 400 for q in behind)
    assert all(q.start >= 460 for q in within)
    rest = set(context.questions) - {*behind, *within}
    assert all(q.start < 50 or (q.end > 400 and q.start < 460) for q in rest)


def test_order_is_the_seeds():
    ids = [contexts(RECORDS, tiny_tokenizer(), 400, 1, seed)[0].ids.tolist() for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]
