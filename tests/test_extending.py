"""The examples of docs/extending.md, installed as the page says, do what it says."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

import ahn
from ahn import cli, registry
from ahn.eval import tasks
from ahn.recall import finders
from conftest import in_pieces, storing, tiny, token_ids, with_memory
from made_articles import FILLER

FILE = Path(__file__).parent.parent / "docs" / "extending.md"
if not FILE.is_file():
    pytest.skip("no documentation in this distribution", allow_module_level=True)
PAGE = FILE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
NAMED = [(re.match(r"# (my_ahn/\w+\.py)\n", code), code) for kind, code in BLOCKS if kind == "python"]
FILES = {name[1]: code for name, code in NAMED if name}


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    """The files as an installed package, with the entry points of the page's pyproject.toml."""
    site = tmp_path / "site"
    for name, code in FILES.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(code)
    (settings,) = (tomllib.loads(code)["project"] for kind, code in BLOCKS if kind == "toml")
    about = site / f"my_ahn-{settings['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Name: {settings['name']}\nVersion: {settings['version']}\n")
    lines = []
    for group, points in settings["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (about / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(site)
    registry._points.cache_clear()
    yield
    registry._points.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_ahn"]:
        del sys.modules[name]


def test_each_is_one_short_file():
    assert sorted(FILES) == [f"my_ahn/{name}.py" for name in ("count", "hebb", "lists", "loud", "trigrams")]
    assert all(code.count("\n") < 60 for code in FILES.values())


def test_they_would_pass_the_checks_of_this_repository(tmp_path):
    """In `src/ahn`, mypy would want every argument typed."""
    untyped = [
        f"{name}: {function.name}({argument.arg})"
        for name, code in FILES.items()
        for function in ast.walk(ast.parse(code))
        if isinstance(function, ast.FunctionDef)
        for argument in [*function.args.args, *function.args.kwonlyargs, ast.arg("return", function.returns)]
        if argument.annotation is None and argument.arg != "self"
    ]
    assert not untyped
    ruff = shutil.which("ruff", path=Path(sys.executable).parent)
    if ruff is None:
        pytest.skip("ruff is not installed")
    for name, code in FILES.items():  # the comment with the name is the page's
        (tmp_path / Path(name).name).write_text(code.partition("\n")[2])
    settings = ["--config", str(FILE.parent.parent / "pyproject.toml"), "--no-cache", str(tmp_path)]
    for command in ("check", "format --check"):
        done = subprocess.run([ruff, *command.split(), *settings], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@torch.no_grad()
def test_the_cell_is_read_and_trained(base, tmp_path, run):
    ids, model = token_ids(60), with_memory(tiny(), "hebb")
    whole = model(ids, use_cache=False).logits
    assert (in_pieces(model, ids, [5, 30, *[1] * 25]) - whole).abs().max() < 1e-4
    (tmp_path / "text.txt").write_text(FILLER * 60)
    recipe = {"base": base, "data": [str(tmp_path / "text.txt")], "output": str(tmp_path / "run"), "steps": 1}
    recipe |= {"length": 64, "batch": 2, "lossless": [16, 32], "sinks": [0, 4], "window": 24, "report_to": []}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with torch.enable_grad():
        code, _, err = run("train", str(tmp_path / "recipe.yaml"), "cell=hebb")
    assert code == 0, err
    trained = ahn.from_pretrained(base, tmp_path / "run" / "adapter")
    assert trained.ahn_config.cell == "hebb"


def test_the_store_keeps_the_same_however_the_text_is_cut():
    (code,) = (code for kind, code in BLOCKS if code.startswith("config = "))
    told = {"ahn": ahn}
    exec(code, told)
    assert told["config"].store == "loud"
    ids, model = token_ids(60), storing("loud", "hebb")
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert (in_pieces(model, ids, [5, 30, *[1] * 25]) - whole).abs().max() < 1e-4


def test_the_finder_finds_misspelt_words(base):
    tokenizer = ahn.load_tokenizer(base)
    model = ahn.from_pretrained(base, window=128, sinks=4)
    secret = "The captain hid the compass in a barrel of apples. "
    memory = ahn.read(model, ahn.Dialogue(tokenizer).open(FILLER * 5 + secret + FILLER * 8), archive="text")
    found = finders.get("trigrams")
    assert found.__module__ == "my_ahn.trigrams"
    answer = ahn.ask(model, tokenizer, memory, "Where is the compas?", 64, finder="trigrams", max_new_tokens=2)
    assert any("compass" in source.text for source in answer.sources)


def test_the_task_is_measured(base, tmp_path, run):
    examples = list(
        tasks.get("lists/last").examples(tokenizer=ahn.load_tokenizer(base), length=120, data=None, seed=0, limit=3)
    )
    for one in examples:
        start, end = one.evidence
        assert one.prompt[start:end] == one.answers[0] and one.prompt[: one.asks].rstrip().endswith(one.answers[0])
        assert tasks.get("lists/last").score(one, f"It is {one.answers[0]}.") == 1
    argv = ["--policies", "window", "--length", "120", "--lossless", "32", "--sinks", "4", "--limit", "2"]
    code, out, err = run(
        "eval", "--base", base, "--tasks", "lists", *argv, "--output", str(tmp_path), "--device", "cpu"
    )
    assert code == 0 and "lists/first" in out and "lists/last" in out, err


def test_the_command_is_listed_and_runs(base, tmp_path, run):
    assert "Count the tokens of documents." in run("--help")[1]
    (tmp_path / "book.txt").write_text("The cat sat.")
    tokens = len(ahn.load_tokenizer(base)("The cat sat.").input_ids)
    assert run("count", str(tmp_path / "book.txt"), "--base", base) == (0, f"{tokens} {tmp_path / 'book.txt'}\n", "")
    assert run("count", "none.txt", "--base", base)[0] == cli.BAD_INPUT
