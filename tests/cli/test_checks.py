"""Errors that are known beforehand come before a model is loaded, in the words of the command line."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ahn
from ahn import cli
from ahn.cli import _console, ask, chat, cost, read
from ahn.errors import AHNError, ConfigError, OutputError
from conftest import tiny

TEXT = "The old cat sat on the mat and looked at 12 mice.\n\n" * 40
SIZES = ("--window", "64", "--sinks", "8")
SOURCE = Path(ahn.__file__).parent


@pytest.fixture(scope="module")
def files(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("checks")
    (folder / "book.txt").write_text(TEXT)
    for name, archive in (("text.ahn", "text"), ("none.ahn", "none")):
        words = ["-o", str(folder / name), "--archive", archive, "--base", base]
        assert cli.main(["read", str(folder / "book.txt"), *words, *SIZES]) == 0
    model = tiny(vocab_size=len(ahn.load_tokenizer(base)), num_hidden_layers=3)
    model.save_pretrained(folder / "other")
    ahn.load_tokenizer(base).save_pretrained(folder / "other")
    return {"TMP": str(folder), "BASE": base, "OTHER": str(folder / "other")}


ASK = ["ask", "--memory", "TMP/text.ahn"]
NEW = ["ask", "--document", "TMP/book.txt", "--base", "BASE"]
KNOWN = [
    ([*ASK, "--recall", "60", "Who?"], "--recall 60: the window of 64"),
    (["ask", "--memory", "TMP/none.ahn", "--recall", "20", "Who?"], "read with --archive text"),
    (["chat", "--memory", "TMP/none.ahn", "--recall", "20"], "--recall 20: the memory has no archive"),
    ([*ASK, "--finder", "bm52", "Who?"], "unknown finder 'bm52'"),
    ([*ASK, "Who sat on the mat? " * 20], "expected at most the window of 64"),
    ([*ASK, "--base", "OTHER", "Who?"], "2 layers, not 3"),
    ([*ASK, "--window", "16", "Who?"], "--window 16: TMP/text.ahn was read with --window 64"),
    ([*ASK, "--dtype", "float16", "Who?"], "--dtype float16: TMP/text.ahn was read with --dtype float32"),
    ([*ASK, "--device", "gpu", "Who?"], "device gpu"),
    ([*ASK, "--adapter", "TMP/absent", "Who?"], "TMP/absent"),
    (["ask", "--memory", "TMP/absent.ahn", "Who?"], "no such memory file"),
    ([*NEW, "--archive", "none", "--recall", "20", "Who?"], "--recall 20: the memory has no archive"),
    ([*NEW, "--archive", "keys", "Who?"], "--archive keys: the adapter names no retrieval heads"),
    ([*NEW, *SIZES, "--recall", "60", "Who?"], "--recall 60: the window of 64"),
    ([*NEW, "--cell", "mamba", "Who?"], "unknown cell 'mamba'"),
    ([*NEW, "--dtype", "int8", "Who?"], "unknown dtype 'int8'"),
    ([*NEW, "--lossless", "8", "--store", "random", "--store-size", "9", "Who?"], "8 lossless tokens"),
]


@pytest.mark.parametrize(("argv", "said"), KNOWN, ids=[" ".join(argv)[:60] for argv, _ in KNOWN])
def test_before_the_model_is_loaded(
    run: Any, files: dict[str, str], monkeypatch: pytest.MonkeyPatch, argv: list[str], said: str
) -> None:
    def filled(text: str) -> str:
        return re.sub("|".join(files), lambda match: files[match[0]], text)

    monkeypatch.setattr("ahn.bases.load_base", lambda *_, **__: pytest.fail("loaded"))
    code, out, err = run(*map(filled, argv))
    last = err.splitlines()[-1]
    assert (code, out) == (cli.BAD_INPUT, "") and filled(said) in last
    assert not re.search(rf"\b({'|'.join(_settings())})=", last)


def _settings() -> set[str]:
    """Names in Python of the options of the commands that read and ask."""
    found = set()
    for command in (ask, chat, cost, read):
        parser = cli.argparse.ArgumentParser()
        command.arguments(parser)
        found |= {action.dest for action in parser._actions if action.option_strings}
    return found


def test_no_message_has_a_setting_in_the_words_of_python() -> None:
    """`{recall}` in a message is what each side says in its own words. Recipes and policies are keys and values."""
    pattern = re.compile(rf"(^|[ (])({'|'.join(_settings())})=")
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        if path.relative_to(SOURCE).parts[0] in ("train", "eval"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error") and node.args:
                parts = [part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)]
                found += [f"{path.name}: {part}" for part in parts if isinstance(part, str) and pattern.search(part)]
    assert not found


def test_an_error_names_settings_in_either_words() -> None:
    error = ConfigError(f"{{recall}} with {{archive}} in {'{finder}'}", recall=9, archive="none")
    assert str(error) == "recall=9 with archive='none' in {finder}"
    parser = cli.argparse.ArgumentParser()
    cli._options.add_recall(parser)
    assert error.told(cli._options.namer(parser)) == "--recall 9 with archive='none' in {finder}"
    assert str(AHNError("one\ntwo {recall}")) == "one two {recall}"
    assert str(OutputError("{output}: full", output="x")) == "output='x': full"


def test_one_and_many() -> None:
    assert [_console.counted(n, "passage") for n in (0, 1, 2, 1234)] == [
        "0 passages", "1 passage", "2 passages", "1,234 passages",
    ]  # fmt: skip


@pytest.mark.parametrize("command", ["ask", "chat", "eval", "calibrate"])
def test_help_names_the_finders(command: str) -> None:
    """Without torch: help has to come at once."""
    code = "import sys; from ahn.cli import main\ntry: main([sys.argv[1], '--help'])\n"
    code += "finally: assert 'torch' not in sys.modules"
    said = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, check=True).stdout
    assert "bm25, fused, heads" in " ".join(said.split())
