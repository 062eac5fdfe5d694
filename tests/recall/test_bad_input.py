"""What recall cannot do is said in one line, with exit code 2, and changes nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import ahn
from ahn import cli
from ahn.memory import segments
from commands import type_in
from conftest import retrieval
from tiny_base import write_base

TEXT = "The old cat sat on the mat and looked at 12 mice.\n\n" * 40
SIZES = ("--window", "64", "--sinks", "8")


@pytest.fixture
def memory(run: Any, base: str, tmp_path: Path) -> Path:
    (tmp_path / "book.txt").write_text(TEXT)
    code, _, err = run("read", str(tmp_path / "book.txt"), "-o", str(tmp_path / "m.ahn"), "--base", base, *SIZES)
    assert code == 0, err
    return tmp_path / "m.ahn"


@pytest.fixture
def refused(run: Any) -> Any:
    """The line in which a command says what is wrong with a file, which stays as it is."""

    def call(file: Path, *argv: str) -> str:
        before = file.read_bytes()
        code, out, err = run(*argv)
        (line,) = [line for line in err.splitlines() if "error: " in line]
        assert (code, out) == (cli.BAD_INPUT, "") and err.endswith(f"{line}\n") and file.read_bytes() == before
        return str(line)

    return call


def test_a_question_longer_than_the_window(refused: Any, memory: Path) -> None:
    line = refused(memory, "ask", "--memory", str(memory), "Who sat on the mat? " * 20)
    assert "question of " in line and "expected at most the window of 64" in line


def test_more_to_read_again_than_the_window_holds(refused: Any, memory: Path) -> None:
    line = refused(memory, "ask", "--memory", str(memory), "--recall", "60", "Who sat?")
    assert "--recall 60: the window of 64 tokens holds the question, which has 17, and 47 more" in line


def test_it_is_said_before_a_document_is_read(run: Any, base: str, memory: Path, tmp_path: Path) -> None:
    for options in (["--recall", "60"], ["--recall", "9", "--archive", "none"]):
        for command in (["ask", "Who sat?"], ["chat"]):
            words = [*command, "--document", str(tmp_path / "book.txt"), "-o", str(tmp_path / "new.ahn")]
            code, out, err = run(*words, "--base", base, *SIZES, *options)
            assert (code, out) == (cli.BAD_INPUT, "") and f"--recall {options[1]}: the " in err
            assert "reading" not in err and not (tmp_path / "new.ahn").exists()


def test_no_archive(run: Any, refused: Any, base: str, memory: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.ahn"
    read = ["read", str(tmp_path / "book.txt"), "-o", str(plain), "--archive", "none", "--base", base, *SIZES]
    assert run(*read)[0] == 0
    assert "has no archive" in refused(plain, "ask", "--memory", str(plain), "--recall", "20", "Who sat?")


def test_a_damaged_archive(refused: Any, memory: Path) -> None:
    data, (archive, *_) = bytearray(memory.read_bytes()), segments.walk(memory)
    data[archive.data + 5] ^= 1
    memory.write_bytes(data)
    line = refused(memory, "ask", "--memory", str(memory), "--recall", "20", "Who sat?")
    assert "damaged archive: its checksum does not match" in line


def test_another_tokenizer(refused: Any, base: str, memory: Path, tmp_path: Path) -> None:
    """Of as many words, beside the same weights."""
    other = tmp_path / "other"
    shutil.copytree(base, other)
    settings = json.loads((other / "tokenizer.json").read_text())
    words = settings["model"]["vocab"]
    words["A"], words["B"] = words["B"], words["A"]
    (other / "tokenizer.json").write_text(json.dumps(settings))
    for recall in ("0", "20"):
        line = refused(memory, "ask", "--memory", str(memory), "--base", str(other), "--recall", recall, "Who sat?")
        assert "another tokenizer" in line


def test_keys_of_other_heads(run: Any, refused: Any, tmp_path: Path) -> None:
    folder, adapter = write_base(tmp_path)
    model = ahn.from_pretrained(folder, adapter)
    for name, pool in (("one", 1), ("two", 4)):
        model.ahn_retrieval = retrieval(pool)
        ahn.save_adapter(model, tmp_path / name)
    (tmp_path / "book.txt").write_text(TEXT)
    file = tmp_path / "m.ahn"
    assert (
        run("read", str(tmp_path / "book.txt"), "-o", str(file), "--base", folder, "--adapter", str(tmp_path / "one"))[
            0
        ]
        == 0
    )
    line = refused(file, "ask", "--memory", str(file), "--adapter", str(tmp_path / "two"), "Who sat?")
    assert "keys of other retrieval heads than those of the adapter" in line


def test_a_chat_goes_on(run: Any, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    type_in(monkeypatch, "Who sat on the mat? " * 20 + "\nWho sat?\n")
    code, _, err = run("chat", "--memory", str(memory), "--max-new-tokens", "2")
    assert code == 0 and "expected at most the window of 64" in err and err.count("tokens/s") == 1


@pytest.mark.parametrize(("has", "asked"), [("text", "none"), ("text", "keys"), ("none", "text"), ("keys", "text")])
def test_another_archive_than_the_memory_has(run: Any, refused: Any, tmp_path: Path, has: str, asked: str) -> None:
    folder, adapter = write_base(tmp_path)
    model = ahn.from_pretrained(folder, adapter)
    model.ahn_retrieval = retrieval()
    ahn.save_adapter(model, tmp_path / "heads")
    (tmp_path / "book.txt").write_text(TEXT)
    (tmp_path / "more.txt").write_text("More.")
    book, more, file = (str(tmp_path / name) for name in ("book.txt", "more.txt", "m.ahn"))
    own = ["--base", folder, "--adapter", str(tmp_path / "heads")]
    assert run("read", book, "-o", file, "--archive", has, *own)[0] == 0
    for words in (["read", book, "-o", file], ["read", more, "--memory", file], ["ask", "--memory", file, "Who?"]):
        line = refused(Path(file), *words, "--archive", asked, *own)
        assert f"--archive {asked}: {file} was read with --archive {has}" in line
    assert run("read", book, "-o", file, "--archive", has, *own)[0] == 0


@pytest.mark.parametrize(("window", "archive", "recall", "hinted"), [
    ("64", "text", [], True),
    ("64", "text", ["--recall", "1"], False),
    ("32", "text", [], False),
    ("64", "none", [], False),
])  # fmt: skip
def test_the_hint_at_recall_can_be_followed(
    run: Any,
    base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    window: str,
    archive: str,
    recall: list[str],
    hinted: bool,
) -> None:
    monkeypatch.setattr("ahn.recall.RECALL", 20)
    (tmp_path / "book.txt").write_text(TEXT)
    words = ["ask", "Who sat?", "--document", str(tmp_path / "book.txt"), "--base", base, "--window", window]
    words += ["--sinks", "8", "--archive", archive, "--max-new-tokens", "1"]
    code, _, err = run(*words, "--sources", *recall)
    assert code == 0 and "no passage was read again" in err and ("(--recall 20 finds some)" in err) == hinted
    assert (run(*words, "--recall", "20")[0] == 0) == (hinted or bool(recall))
