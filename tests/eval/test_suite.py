"""Comparisons that one file describes: `ahn eval --suite`."""

import json
import os
import subprocess
import sys

import pytest
import torch

from ahn import cli
from ahn.eval import policies, results, suite, work
from ahn.eval.policies.base import Policy
from tiny_base import SINKS, WINDOW, write_base

TEXT = "The old cat sat on a mat and looked at twelve mice while it rained. " * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, and articles with questions."""
    folder = tmp_path_factory.mktemp("suite")
    write_base(folder, positions=4096)
    names = ("Anna", "Boris", "Clara", "Doris")
    asked = [{"question": f"Where does {name} live?", "answers": [f"Town{i}"]} for i, name in enumerate(names)]
    articles = [
        {"title": name, "paragraphs": [{"context": f"{TEXT} {name} lives in Town{i}. {TEXT}", "qas": [asked[i]]}]}
        for i, name in enumerate(names)
    ]
    (folder / "squad.jsonl").write_text("".join(json.dumps(article) + "\n" for article in articles))
    return folder


def written(path, text):
    path.write_text(text)
    return path


def suite_of(folder, path):
    return written(
        path,
        f"""\
base: {folder / "tiny-base"}
adapter: {folder / "tiny-adapter"}
tasks: [qa/squad]
data: {folder / "squad.jsonl"}
length: [1100]
sinks: {SINKS}
recall: 16
device: cpu
limit: 3
batch: 2
output: {path.parent / "results"}
summary: {path.parent / "summary.json"}
note: tiny
runs:
  - policies: [window, recall]
    lossless: [{WINDOW + SINKS}, 64]
  - policies: [rag]
    lossless: 1/8
""",
    )


def test_a_suite_from_its_file_to_its_summary(folder, tmp_path, capsys, monkeypatch):
    path = suite_of(folder, tmp_path / "tiny.yaml")
    assert cli.main(["eval", "--suite", str(path)]) == 0
    said, noted = capsys.readouterr()
    lines = [f"policies=[window,recall] lossless={WINDOW + SINKS}", "policies=[window,recall] lossless=64"]
    lines += ["policies=rag lossless=137"]
    assert [line for line in (said + noted).splitlines() if line.startswith("run ")] == [
        f"run {n} of 3: {line}" for n, line in enumerate(lines, 1)
    ]
    assert f"{WINDOW + SINKS} lossless tokens" in said and "64 lossless tokens" in said
    found = results.find([tmp_path / "results"])
    assert sorted((r.config["policy"], r.config["window"]) for r in found) == [
        ("rag", 129), ("recall", 24), ("recall", 56), ("window", 24), ("window", 56),
    ]  # fmt: skip
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["environment"]["date"] and written["environment"]["torch"]
    assert (written["note"], written["base"], written["tokens"]) == ("tiny", "tiny-base", 1100)
    assert written["settings"][-1]["lossless"] == 137
    assert [(row["policy"], row["lossless"], row["n"]) for row in written["rows"]] == [
        ("window", 32, 3), ("recall", 32, 3), ("window", 64, 3), ("recall", 64, 3), ("rag", 137, 3),
    ]  # fmt: skip
    for row in written["rows"]:
        assert row["low"] <= row["score"] <= row["high"] and len(row["by_depth"]) == suite.DEPTHS

    # a second run loads nothing, asks nothing, and changes nothing but the summary's date
    before = {p: p.read_bytes() for p in (tmp_path / "results").rglob("*") if p.is_file()}
    monkeypatch.setattr(Policy, "__init__", lambda *args, **options: pytest.fail("a model was loaded"))
    assert cli.main(["eval", "--suite", str(path)]) == 0
    assert before == {p: p.read_bytes() for p in (tmp_path / "results").rglob("*") if p.is_file()}
    assert json.loads((tmp_path / "summary.json").read_text())["rows"] == written["rows"]


def test_a_base_is_loaded_once_and_prompts_are_made_once(folder, tmp_path, monkeypatch):
    from ahn import bases

    loaded, made, load, prepare = [], [], bases.load_base, work.prepare
    monkeypatch.setattr("ahn.eval.policies.base.load_base", lambda *a, **k: loaded.append(a) or load(*a, **k))
    monkeypatch.setattr(work, "prepare", lambda *a: made.append(a) or prepare(*a))
    path = suite_of(folder, tmp_path / "tiny.yaml")
    assert cli.main(["eval", "--suite", str(path), "tasks=[qa/squad]", "limit=2"]) == 0
    assert len(loaded) == 1 and len(made) == 1


def test_a_run_that_fails_costs_no_other(folder, tmp_path, capsys, monkeypatch):
    cls = policies.get("recall")
    prepare = cls.prepare

    def broken(self):
        if self.kept.window == WINDOW:
            raise RuntimeError("no memory\nof it")
        prepare(self)

    monkeypatch.setattr(cls, "prepare", broken)
    path = suite_of(folder, tmp_path / "tiny.yaml")
    assert cli.main(["eval", "--suite", str(path)]) == 2
    assert "1 of 3 runs failed: run 1: " in capsys.readouterr().err
    done = {(r.config["policy"], r.config["window"]) for r in results.find([tmp_path / "results"])}
    assert done == {("window", 24), ("window", 56), ("recall", 56), ("rag", 129)}
    monkeypatch.undo()
    assert cli.main(["eval", "--suite", str(path)]) == 0
    assert len(json.loads((tmp_path / "summary.json").read_text())["rows"]) == 5


def test_no_time_is_left(folder, tmp_path):
    path = suite_of(folder, tmp_path / "tiny.yaml")
    assert cli.main(["eval", "--suite", str(path), "--seconds", "0"]) == 75
    assert not list(tmp_path.rglob("predictions*"))
    assert cli.main(["eval", "--suite", str(path), "--seconds", "1e9", "limit=1"]) == 0


def test_runs_differ_in_what_they_say(tmp_path):
    text = (
        "tasks: [ruler]\nlimit: 3\nlength: [64, 128]\nruns:\n- {lossless: [8, 16], seed: [1, 2]}\n- {lossless: 1/4}\n"
    )
    plan = suite.load(written(tmp_path / "s.yaml", text), ["limit=5"])
    assert [(run["lossless"], run["seed"]) for run in plan.runs[:4]] == [(8, 1), (8, 2), (16, 1), (16, 2)]
    assert [(run["lossless"], run["length"], run["share"]) for run in plan.runs[4:]] == [(16, 64, 4), (32, 128, 4)]
    assert all(run["limit"] == 5 and run["tasks"] == ["ruler"] for run in plan.runs)
    plan = suite.load(written(tmp_path / "s.yaml", text), ["lossless=32"])
    assert [(run["lossless"], run.get("seed")) for run in plan.runs] == [(32, 1), (32, 2), (32, None)], "each run once"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks: [ruler]\nlimt: 3", "unknown key 'limt'"),
        ("tasks: [ruler]\nlimit: none", "--limit: 'none': expected an integer of at least 1"),
        ("tasks: [ruler]\nlimit: {a: 1}", "limit: {'a': 1}: expected text or a number"),
        ("tasks: [ruler]\nbatch: true", "batch: True: expected text or a number"),
        ("tasks: [ruler]\nruns: 3", "runs: 3: expected a list of runs"),
        ("tasks: [ruler]\nlossless: 1/8", "lossless: 1/8 of length None: expected a number of tokens"),
        ("tasks: [nowhere/x]", "nowhere/x"),
        ("limit: 3", "--tasks: expected at least one"),
        ("output: [a]", "output: ['a']: expected text"),
        ("- a", "expected keys and values"),
        ("together: 3", "unknown key 'together'"),
    ],
)
def test_a_suite_that_cannot_be_used(tmp_path, capsys, text, said):
    path = written(tmp_path / "s.yaml", text)
    assert cli.main(["eval", "--suite", str(path), "--output", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--suite", "SUITE", "--limit", "3"], "--limit: with --suite, write limit=3"),
        (["--suite", "SUITE", "--length", "8", "16"], "--length: with --suite, write length=[8,16]"),
        (["--suite", "SUITE", "limit"], "'limit': expected key=value"),
        (["--suite", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["--tasks", "ruler", "--limit", "3", "limit=3"], "'limit=3'"),
    ],
)
def test_options_that_a_suite_does_not_take(folder, tmp_path, capsys, argv, said):
    path = suite_of(folder, tmp_path / "s.yaml")
    assert cli.main(["eval", *(str(path) if word == "SUITE" else word for word in argv)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--policies", "recall", "--recall", str(WINDOW)], f"--recall {WINDOW}: the window of {WINDOW} tokens holds"),
        (["--policies", "window", "rag", "--recall", "8", "--finder", "heads"], "--finder heads: no policy of window,"),
        (["--policies", "rag", "--recall", "8", "--rounds", "2"], "--rounds 2: no policy of rag has it"),
    ],
)
def test_options_of_recall_that_cannot_be_met(folder, tmp_path, capsys, argv, said):
    run = ["--base", str(folder / "tiny-base"), "--adapter", "none", "--tasks", "qa/squad", "--sinks", str(SINKS)]
    where = ["--lossless", str(WINDOW + SINKS), "--data", str(folder / "squad.jsonl"), "--output", str(tmp_path / "o")]
    assert cli.main(["eval", *run, *where, *argv]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_processes_share_the_texts_of_a_suite(folder, tmp_path):
    path = suite_of(folder, tmp_path / "tiny.yaml")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for output, count in (("one", "1"), ("two", "2")):
        argv = ["eval", "--suite", str(path), "--output", str(tmp_path / output), "--together", count]
        done = subprocess.run(
            [sys.executable, "-m", "ahn", *argv], capture_output=True, text=True, env=environment, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("qa/squad") == 3, "one process speaks for all"
    one, two = (
        {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("predictions*")}
        for name in ("one", "two")
    )
    assert one == two and len(one) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "code", "said"), [(["--seconds", "0"], 75, "time is over"), (["limt=3"], 2, "'limt'")]
)
def test_processes_end_with_the_exit_code_of_one(folder, tmp_path, more, code, said):
    path = suite_of(folder, tmp_path / "tiny.yaml")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    argv = ["eval", "--suite", str(path), *more, "--together", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "ahn", *argv], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr


def test_a_batch_that_does_not_fit_is_split(folder, tmp_path, monkeypatch):
    sizes, after = [], Policy.after

    def small(self, cache, rows, limits):
        sizes.append(len(rows))
        if len(rows) > 1:
            raise torch.OutOfMemoryError("two rows")
        return after(self, cache, rows, limits)

    path = suite_of(folder, tmp_path / "tiny.yaml")
    argv = ["eval", "--suite", str(path), "batch=4", "runs=[{policies: [rag]}]"]
    assert cli.main([*argv, "--output", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(Policy, "after", small)
    assert cli.main([*argv, "--output", str(tmp_path / "split")]) == 0
    assert max(sizes) > 1 and sizes.count(1) == 3
    whole, split = (
        [p.read_bytes() for p in (tmp_path / name).rglob("predictions.jsonl")] for name in ("whole", "split")
    )
    assert whole == split
