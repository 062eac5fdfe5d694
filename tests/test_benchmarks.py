"""Parts of the benchmarks that could be wrong without anyone seeing it."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import ahn
from conftest import retrieval, tiny, token_ids, with_memory

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
    with pytest.raises(SystemExit, match="75"):
        run("--seconds", "0")
    assert "time is over" in capsys.readouterr().out

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

    floors = gpu.Floors(PAPER["qwen2.5-3b"], 2, 32640, 128, gpu.Ceilings(matmul=1e15, copy=1e12))
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
    gb = [round(floors.decode_bytes("gated_deltanet", batch, 131072) / 1e9, 1) for batch in (1, 8, 32)]
    pflop = [round(floors.read_flops("gated_deltanet", 1, length) / 1e15, 2) for length in (65536, 131072, 2**20)]
    assert gb == [7.5, 16.5, 47.3] and pflop == [0.84, 1.84, 15.84]  # as in docs/performance.md


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Runs benchmarks/gpu.py on tiny shapes; returns whether it ran to its end, its rows and what it skipped."""
    import common
    import gpu

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "matmul_rate", lambda device: 1e12)
    monkeypatch.setattr(gpu, "copy_rate", lambda device: 1e11)

    def run(**changes):
        options = {"seconds": 600, "only": None, "base": None, "cell": "gated_deltanet", "tiny": True, "authors": None}
        options |= {"profile": False, "raises": False, "name": "gpu"} | changes
        whole = gpu.Bench(argparse.Namespace(**options)).run()
        written = json.loads((tmp_path / "gpu.json").read_text())
        return whole, written["rows"], written["skipped"]

    return run


def test_a_table_of_a_gpu(table):
    whole, rows, skipped = table(only=["gated_deltanet", "full:decode"], raises=True)
    assert whole and len(skipped) == 1
    kinds = [(row["cell"], row["what"]) for row in rows]
    assert kinds == [*2 * [("gated_deltanet", "decode")], ("gated_deltanet", "read"), *2 * [("full", "decode")],
                     ("gated_deltanet", "load")]  # fmt: skip
    assert rows[2]["cache_over_model"] == 0
    assert rows[-1]["file_mb"] > 0.02 and rows[-1]["load_s"] < rows[-1]["first_token_s"]


@pytest.mark.parametrize("recovers", [True, False])
def test_a_cell_that_fails_costs_no_other(table, monkeypatch, recovers):
    import gpu

    def broken(*args):
        raise RuntimeError("no memory\nof it")

    monkeypatch.setattr(gpu, "generate", broken)
    monkeypatch.setattr(gpu.Bench, "recovers", lambda bench: recovers)
    whole, rows, skipped = table(only=["gated_deltanet:decode", "read:full"])
    assert whole == recovers
    assert rows[0]["error"] == "RuntimeError: no memory" and rows[0]["decode_ms"] > 0
    assert len(rows) == (3 if recovers else 1) and not any("error" in row for row in rows[1:])
    assert recovers or [text.partition(": ")[0] for text in skipped] == [
        "tiny:gated_deltanet:decode:2:300", "tiny:full:read:1:500",
    ]  # fmt: skip


def test_real_weights_on_a_gpu(table, tmp_path, monkeypatch):
    import gpu
    from tiny_base import write_base

    base, _ = write_base(tmp_path)
    monkeypatch.setattr(gpu, "ANSWER", 8)
    whole, rows, _ = table(base=base, raises=True)
    assert whole and [row["length"] for row in rows] == [300, 500]
    assert all(row["memory"] == "gated_deltanet" and row["answer_tokens_per_s"] > 0 for row in rows)


def test_loading_a_memory(tmp_path, monkeypatch, capsys):
    import common
    import load
    from tiny_base import write_base

    base, _ = write_base(tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["load.py", "--base", base, "--lossless", "80", "96", "--repeats", "1"])
    load.main()
    rows = json.loads((tmp_path / "results" / "load-cpu.json").read_text())["rows"]
    assert [row["lossless"] for row in rows] == [80, 96] and rows[0]["file_mb"] < rows[1]["file_mb"]
    assert all(row["length"] == 2**20 and row["cell"] == "gated_deltanet" for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_share_for_the_store(tmp_path):
    from common import put_on, set_lossless

    model = with_memory(tiny(), window=12, sinks=2, store="recency", store_size=36)
    ahn.save_adapter(model, tmp_path / "a")
    for share, sizes in (("", (36, 12)), ("@0.25", (12, 36)), ("@none", (0, 12))):
        put_on(model, f"{tmp_path / 'a'}{share}")
        assert (model.ahn_config.store_size, model.ahn_config.window) == sizes
    put_on(model, f"{tmp_path / 'a'}@0.25")
    set_lossless(model, 26, 2)
    assert (model.ahn_config.store_size, model.ahn_config.window) == (6, 18)


def test_jobs_run_behind_those_they_build_on(tmp_path, capsys):
    from all import Job, Runner

    asleep = "-c __import__('time').sleep(100_000)"
    jobs = (
        Job("second", "-c pass", ("first",)),
        Job("first", "-c pass"),
        Job("broken", "-c 1/0"),
        Job("hopeless", "-c pass", ("broken",)),
        Job("long", asleep, (), 0.5),
        Job("behind long", "-c pass", ("long",)),
        Job("unfinished", "-c exit(75)"),
        Job("free", "-c pass", ("not asked for",)),
    )
    left = Runner(jobs, 2, 60, tmp_path, {}).run()
    assert left == ["broken", "hopeless", "long", "behind long", "unfinished"]
    assert "ZeroDivisionError" in (tmp_path / "logs" / "broken").read_text()
    said = capsys.readouterr().out
    assert said.index("first: done") < said.index("second: begins") and "long: time is over" in said
    # what is done or has failed is not begun again, what had no time is
    assert Runner(jobs, 2, 60, tmp_path, {}).run() == left
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if "begins" in line] == [
        "long",
        "unfinished",
    ]
    # nothing is left behind when the time of all is over
    assert Runner((Job("endless", asleep),), 1, 0.5, tmp_path, {}).run() == ["endless"]


def test_commands_of_jobs_are_whole():
    from all import JOBS, filled

    values = dict.fromkeys(("data", "qwen", "qwen15", "smollm2", "output"), "X") | {"name": "N", "left": "5"}
    names = [job.name for job in JOBS]
    for job in JOBS:
        script, *rest = filled(job.command, values).split()
        assert script == "-m" or (BENCHMARKS / script).is_file()
        assert set(job.after) <= set(names)
        for word in rest:
            assert not word.startswith("../") or (BENCHMARKS / word).exists()


def results_of(folder, task, policy="recall", adapter="heads", rounds=1, **signals):
    """Three questions, with these signals of support."""
    from ahn.eval import results

    config = {
        "version": results.VERSION, "task": task, "suite": "qa", "kind": "generate", "policy": policy, "base": "b",
        "cost": {}, "length": 16384, "adapter": adapter,
        "settings": {"recall": {"tokens": 512, "finder": "fused", "rounds": rounds}},
    }  # fmt: skip
    path = folder / task / f"{policy}-{adapter}-{rounds}"
    path.mkdir(parents=True)
    results.write_config(path, config)
    for i in range(3):
        support = {name: value[i] for name, value in signals.items()}
        row = {"id": str(i), "prompt": "p", "score": 0.5, "found": i / 2, "support": support}
        results.append(path, 0, row)


def test_calibration_of_results(tmp_path, monkeypatch, capsys):
    import common
    import support
    from ahn.adapter_files import read_adapter, write_adapter
    from tiny_base import write_base

    for part in ("a", "b"):
        low = 3.0 if part == "a" else 1.0
        results_of(tmp_path / part, "qa/squad", said=[low, 4, 5], words=[0, 1, 1])
        results_of(tmp_path / part, "qa/squad-absent", said=[-1, 0, 3.5 if part == "b" else 1], words=[0, 1, 0])
        results_of(tmp_path / part, "qa/squad", rounds=2, said=[-9, -9, -9], words=[0, 0, 0])
        results_of(tmp_path / part, "qa/squad", policy="rag", said=[-9, -9, -9], words=[0, 0, 0])
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    _, adapter = write_base(tmp_path)
    found = read_adapter(adapter)
    found.retrieval = retrieval()
    write_adapter(found, adapter)
    argv = ["support.py", "calibrate", str(tmp_path / "a"), "--report", str(tmp_path / "b"), "--name", "s"]
    monkeypatch.setattr(sys, "argv", [*argv, "--adapter", adapter, "--output", adapter])
    support.main()
    written = json.loads((tmp_path / "results" / "s.json").read_text())
    assert written["calibration"] == {"signals": ["said"], "weights": [1.0], "threshold": 3.0}
    (chosen,) = [one for one in written["candidates"] if one["chosen"]]
    assert chosen["area"] == {"calibrate": 1.0, "report": pytest.approx(8 / 9)}
    squad, absent = chosen["report"]["qa/squad"], chosen["report"]["qa/squad-absent"]
    assert (squad["refused"], squad["with_evidence"], squad["refused_with_evidence"]) == (33.33, 1, 0)
    assert (squad["score"], squad["score_with_refusals"]) == (50, 33.33) and absent["answered"] == 33.33
    assert read_adapter(adapter).retrieval.calibration.to_dict() == written["calibration"]

    results_of(tmp_path / "a", "qa/squad", adapter="coder", said=[1, 1, 1], words=[0, 0, 0])
    with pytest.raises(SystemExit):
        support.main()
    assert "choose by --of" in capsys.readouterr().err
    sys.argv += ["--of", "heads", "--signals", "words"]
    support.main()
    assert read_adapter(adapter).retrieval.calibration.signals == ("words",)


def test_articles_to_calibrate_on(tmp_path, monkeypatch):
    import support

    (tmp_path / "a.jsonl").write_text("".join(f'{{"title": "{i}"}}\n' for i in range(9)))
    output = tmp_path / "b.jsonl"
    monkeypatch.setattr(sys, "argv", ["s", "articles", str(tmp_path / "a.jsonl"), str(output), "--count", "2"])
    support.main()
    assert [json.loads(line)["title"] for line in output.read_text().splitlines()] == ["7", "8"]
