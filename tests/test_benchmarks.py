"""Parts of the benchmarks that could be wrong without anyone seeing it."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import ahn
from conftest import tiny, token_ids, with_memory

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("no benchmarks in this distribution", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))


@torch.no_grad()
def test_questions_in_a_batch_are_answered_as_one_by_one():
    import qa

    model = with_memory(tiny())
    texts = token_ids(40, batch=2)
    sizes = [(0, 5, 3), (1, 9, 1), (1, 2, 4)]
    asked = [
        qa.Asked("behind", row, None, token_ids(prompt, seed=prompt)[0], token_ids(answer, seed=answer)[0])
        for row, prompt, answer in sizes
    ]
    cache = ahn.read(model, texts)
    cache.batch_select_indices(torch.tensor([one.row for one in asked]))
    losses = qa.answer_losses(model, cache.fork(), asked)
    answers = qa.greedy(model, cache, asked, limit=12, ends=[])
    for one, loss, answer in zip(asked, losses, answers, strict=True):
        whole = torch.cat([texts[one.row], one.prompt, one.answer])[None]
        logits = model(whole, use_cache=False).logits[0, -len(one.answer) - 1 : -1]
        assert loss == pytest.approx(cross_entropy(logits, one.answer).item(), abs=1e-4)
        alone = ahn.read(model, texts[one.row])
        assert answer == ahn.generate(model, one.prompt, alone, max_new_tokens=12, eos_token_id=-1)[0].tolist()


def test_an_answer_ends_before_the_token_that_ends_it():
    import qa

    model = with_memory(tiny())
    asked = [qa.Asked("within", 0, None, token_ids(5)[0], token_ids(1)[0])]
    cache = ahn.read(model, token_ids(40))
    (free,) = qa.greedy(model, cache.fork(), asked, limit=6, ends=[])
    (ended,) = qa.greedy(model, cache, asked, limit=6, ends=[free[3]])
    assert ended == free[: free.index(free[3])]


def test_flops_of_a_step():
    import train
    from ahn.cost import PAPER
    from ahn.train.recipe import from_dict

    shape = PAPER["qwen2.5-3b"]
    recipe = from_dict(train.RECIPE | {"length": 1024, "batch": 2})
    weights = 36 * (2 * 2048 * (2048 + 256) + 3 * 2048 * 11008)
    pairs, kept = 1024 * 1024 // 2, 512 * 512 // 2 + 512 * 512
    attention = 36 * 4 * 2048 * (pairs + 3 * kept)
    cells = 36 * 512 * 3 * 2 * (2 * 16 * 128 * 128 + 3 * 2048 * 16)
    head = 512 * 3 * 2 * 2048 * 151936
    assert train.flops(shape, recipe, 500, 12) == 2 * (3 * 2 * 1024 * weights + attention + cells + head)


def test_evaluate_goes_on_where_time_was_over_and_names_what_fails(tmp_path, monkeypatch, capsys):
    import evaluate
    import stand_in
    from ahn.eval import results
    from tiny_base import write_base

    stand_in.put_in_place(monkeypatch)
    base, adapter = write_base(tmp_path)
    steps = [
        evaluate.Step("needle", (("standin/needle", None),), 120, 6),
        evaluate.Step("broken", (("standin/needle", "nowhere"),), 120, 6),
        evaluate.Step("text", (("standin/text", None),), 200, 3),
        evaluate.Step("too long", (("standin/text", None),), 2000, 3),
    ]
    monkeypatch.setattr(evaluate, "STEPS", steps)
    argv = ["evaluate.py", str(tmp_path), "--model", f"{base}={adapter}", "--output", str(tmp_path / "out")]
    argv += ["--device", "cpu", "--prompts", str(tmp_path / "prompts")]

    def run(*more):
        monkeypatch.setattr(sys, "argv", [*argv, *more])
        evaluate.main()
        return capsys.readouterr().out

    said = run("--prepare")
    assert "6 examples" in said and "too long" not in said and "broken, tiny-base: without standin/needle" in said
    assert not (tmp_path / "out").exists()
    assert "time is over" in run("--seconds", "0")

    def counts():
        return {(r.config["task"], r.config["policy"]): len(r.rows) for r in results.find([tmp_path / "out"])}

    every = list(evaluate.rounds())
    monkeypatch.setattr(evaluate, "rounds", lambda: every[:1])
    assert "all is done" in run()
    assert counts() == {(task, p): n for task, n in (("standin/needle", 2), ("standin/text", 1)) for p in every[0][1]}
    monkeypatch.setattr(evaluate, "rounds", lambda: every)
    load, bad = evaluate.Plan.works, iter([True])
    broken = lambda plan, data: load(plan, data) if plan.step.name != "text" else [next(bad)]  # noqa: E731
    monkeypatch.setattr(evaluate.Plan, "works", broken)
    said = run()
    assert "text, tiny-base: FAILED" in said and said.rstrip().endswith("all is done, but text, tiny-base")
    assert {n for (task, _), n in counts().items() if "needle" in task} == {6}
    assert len(counts()) == len(every[0][1]) + len(every[0][1] + every[1][1])


def test_floors_of_a_gpu():
    """Bytes of a step and products of reading, by hand, of Qwen2.5-3B with 32,640 + 128 lossless tokens."""
    import gpu
    from ahn.cost import PAPER

    floors = gpu.Floors.__new__(gpu.Floors)  # nothing is measured
    floors.shape, floors.itemsize, floors.window, floors.sinks = PAPER["qwen2.5-3b"], 2, 32640, 128
    floors.copy, floors.matmul = 1e12, 1e15
    linear = 36 * (2 * 2048 * 128 * (16 + 2) + 3 * 2048 * 11008)
    cell = 36 * (3 * 2048 * 16 + 16 * 128 * 128 + 3 * 16 + 128)
    head = 151936 * 2048
    kept, state = 36 * 2 * 2 * 128 * 32768, 36 * 16 * 128 * 128
    expected = 2 * (linear + cell + head + 8 * kept) + 8 * 2 * 4 * state
    assert floors.decode_bytes("gated_deltanet", 8, 10**6) == expected
    assert floors.decode("gated_deltanet", 8, 10**6) == pytest.approx(expected / 1e12)
    full = 2 * (linear + head + 36 * 2 * 2 * 128 * 65536)
    assert floors.decode_bytes("full", 1, 65536) == full
    reading = 2 * linear * 32768 + 36 * 2 * 2048 * 32768**2 + 2 * head
    assert floors.read("gated_deltanet", 1, 32768) == pytest.approx(reading / 1e15)
