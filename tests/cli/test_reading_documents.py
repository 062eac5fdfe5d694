"""`ahn read`: several documents, what is written where, and what survives a stop."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ahn
from ahn import cli, files
from ahn.cli import _console, _reading, _session
from ahn.memory import file_format
from commands import SMALL, TEXT, forked, interrupt_reading, type_in

MODEL = SMALL[:4]
OTHER = "A dog ran after 3 cars.\n\n" * 70


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


def tensors(path: Path) -> dict[str, torch.Tensor]:
    from ahn.memory import segments

    return {name: tensor.clone() for name, tensor in segments.read(path, segments.walk(path)[-1]).items()}


def assert_same(one: Path, two: Path) -> None:
    """The same memory, up to the order in which sums were made."""
    a, b = tensors(one), tensors(two)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], atol=1e-4, rtol=0)
    assert file_format.peek(one)["tokens_seen"] == file_format.peek(two)["tokens_seen"]


def test_a_single_document_has_the_ids_of_before(run: Any, base: str, book: Path, tmp_path: Path) -> None:
    from ahn.dialogue import Dialogue

    memory = tmp_path / "book.ahn"
    assert run("read", str(book), "-o", str(memory), "--base", base, *MODEL)[0] == 0
    ids = Dialogue(ahn.load_tokenizer(base)).open(TEXT)
    assert file_format.peek(memory)["tokens_seen"] == ids.shape[1]
    assert file_format.peek(memory)["texts"][0]["complete"]


@pytest.mark.parametrize("command", ["read", "ask", "chat"])
def test_several_documents_are_read_in_order(
    run: Any,
    base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    (tmp_path / "folder").mkdir()
    for name, text in {
        "b.txt": "Bee.",
        "folder/1.md": "One.",
        "folder/2.txt": "Two.",
        "x1.md": "X.",
        "x2.md": "Y.",
    }.items():
        (tmp_path / name).write_text(f"  {text}\n\n")
    monkeypatch.chdir(tmp_path)
    texts: list[str] = []
    stream = ahn.Dialogue.stream

    def spy(self: Any, pieces: Any) -> Any:
        texts.append("".join(pieces))
        return stream(self, [texts[-1]])

    monkeypatch.setattr(ahn.Dialogue, "stream", spy)
    given = ["b.txt", "folder", "x*.md"]
    options = given if command == "read" else [word for name in given for word in ("--document", name)]
    extra = {"read": ["-o", "all.ahn"], "ask": [*SMALL[4:], "Who?"], "chat": SMALL[4:]}[command]
    type_in(monkeypatch, "Who?\n")
    code, _, err = run(command, *options, "--base", base, *MODEL, *extra)
    assert code == 0, err
    found = re.findall(r"# (\S+)\n\n(\w+\.)", texts[0])
    assert found == [
        ("b.txt", "Bee."),
        ("folder/1.md", "One."),
        ("folder/2.txt", "Two."),
        ("x1.md", "X."),
        ("x2.md", "Y."),
    ]


def test_an_existing_file_is_not_replaced_unasked(run: Any, base: str, book: Path, tmp_path: Path) -> None:
    memory, notes, other = tmp_path / "book.ahn", tmp_path / "notes.txt", tmp_path / "other.txt"
    assert run("read", str(book), "-o", str(memory), "--base", base, *MODEL)[0] == 0
    notes.write_text("mine")
    other.write_text(OTHER)
    before = memory.read_bytes()
    for command in (["read", str(other)], ["ask", "--document", str(other), "Who?"]):
        code, out, err = run(*command, "-o", str(memory), "--base", base, *MODEL)
        assert code == cli.BAD_INPUT and not out and "another text" in err and "--force" in err
        code, out, err = run(*command, "-o", str(notes), "--base", base, *MODEL)
        assert code == cli.BAD_INPUT and not out and "no memory file" in err and "--force" in err
    assert memory.read_bytes() == before and notes.read_text() == "mine"
    assert run("read", str(other), "-o", str(memory), "--force", "--base", base, *MODEL)[0] == 0
    assert memory.read_bytes() != before
    code, _, err = run("read", str(other), "-o", str(memory), "--base", base, *MODEL)  # the same again: nothing to do
    assert code == 0 and "resumed" in err and "read    0 tokens" in err


@pytest.mark.parametrize("made", ["pipe", "pipe behind a link"])
def test_the_output_must_be_a_file(run: Any, base: str, book: Path, tmp_path: Path, made: str) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    code, _, err = run("read", str(book), "-o", str(link if "link" in made else pipe), "--base", base, *MODEL)
    assert code == cli.BAD_INPUT and "is a pipe; expected a file name" in err and len(err.splitlines()) == 1
    assert pipe.is_fifo() and link.is_symlink()


@pytest.mark.parametrize("store", [[], ["--store", "recency", "--store-size", "8"]])
def test_the_same_command_goes_on_where_it_stopped(
    run: Any,
    base: str,
    book: Path,
    tmp_path: Path,
    store: list[str],
) -> None:
    whole, memory = tmp_path / "whole.ahn", tmp_path / "book.ahn"
    options = ["--base", base, "--chunk", "100", *MODEL, *store]
    assert run("read", str(book), "-o", str(whole), *options)[0] == 0
    for after in (300, 500):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_reading(patch, after - (after - 300) // 2 * 3)
            code, _, err = run("read", str(book), "-o", str(memory), *options)
        assert code == cli.INTERRUPTED and f"interrupted after {after} of" in err and "the same command goes on" in err
        assert not file_format.peek(memory)["texts"][0]["complete"]
    code, _, err = run("read", str(book), "-o", str(memory), *options)
    assert code == 0 and f"resumed {memory}: it holds the first 500 tokens" in err
    assert_same(memory, whole)
    assert file_format.peek(memory)["texts"] == file_format.peek(whole)["texts"]
    assert file_format.peek(memory)["archive"]["documents"] == [str(book)]


def test_the_output_is_no_document(run: Any, base: str, book: Path, tmp_path: Path) -> None:
    before = book.read_bytes()
    (tmp_path / "link.txt").symlink_to(book)
    for output in (book, tmp_path / "link.txt"):
        code, _, err = run("read", str(book), "-o", str(output), "--force", "--base", base, *MODEL)
        assert code == cli.BAD_INPUT and "is one of the documents" in err
    assert book.read_bytes() == before


def test_two_processes_do_not_write_to_one_output(run: Any, base: str, book: Path, tmp_path: Path) -> None:
    memory, more = tmp_path / "book.ahn", tmp_path / "more.txt"
    more.write_text(OTHER)
    assert run("read", str(book), "-o", str(memory), "--base", base, *MODEL)[0] == 0
    held = file_format.peek(memory)["tokens_seen"]
    with files.claimed(memory):  # as another process does while it reads
        code, _, err = run("read", str(more), "--memory", str(memory))
        assert code == cli.BAD_INPUT and "another process is writing to it" in err
    assert run("read", str(more), "--memory", str(memory))[0] == 0
    assert file_format.peek(memory)["tokens_seen"] > held


def test_going_on_needs_the_same_settings(
    run: Any,
    base: str,
    book: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = tmp_path / "book.ahn"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_reading(patch, 300)
        run("read", str(book), "-o", str(memory), "--base", base, "--chunk", "100", *MODEL)
    before = memory.read_bytes()
    code, _, err = run("read", str(book), "-o", str(memory), "--base", base, "--window", "16")
    assert code == cli.BAD_INPUT and "--window 16" in err and "--window 24" in err
    assert memory.read_bytes() == before


@pytest.mark.parametrize("elsewhere", [False, True])
def test_more_is_appended(run: Any, base: str, book: Path, tmp_path: Path, elsewhere: bool) -> None:
    from ahn.dialogue import Dialogue

    memory, new, other = tmp_path / "book.ahn", tmp_path / "new.ahn", tmp_path / "other.txt"
    other.write_text(OTHER)
    assert run("read", str(book), "-o", str(memory), "--base", base, *MODEL)[0] == 0
    before = memory.read_bytes()
    command = ["read", str(other), "--memory", str(memory), *(["-o", str(new)] if elsewhere else []), "--chunk", "100"]
    with pytest.MonkeyPatch.context() as patch:
        interrupt_reading(patch, 200)
        code, _, err = run(*command)
    assert code == cli.INTERRUPTED, err
    code, _, err = run(*command)
    assert code == 0 and "resumed" in err
    target = new if elsewhere else memory
    assert (memory.read_bytes() == before) is elsewhere
    ids = Dialogue(ahn.load_tokenizer(base)).open(f"{TEXT.strip()}\n\n{OTHER}")
    header = file_format.peek(target)
    assert header["tokens_seen"] == ids.shape[1] and [text["complete"] for text in header["texts"]] == [True, True]
    assert run("ask", "--memory", str(target), *SMALL[4:], "Who?")[0] == 0


def test_old_memory_files_are_appended_to(run: Any, base: str, book: Path, tmp_path: Path) -> None:
    import json

    from safetensors import safe_open
    from safetensors.torch import save_file

    memory = tmp_path / "book.ahn"
    assert run("read", str(book), "-o", str(memory), "--base", base, *MODEL, "--archive", "none")[0] == 0
    with safe_open(memory, "pt") as file:
        header = json.loads(file.metadata()["memory"])
    del header["texts"]
    header["sha256"] = file_format.checksum(header, tensors(memory))
    save_file(tensors(memory), memory, metadata={"memory": json.dumps(header)})
    assert run("ask", "--memory", str(memory), *SMALL[4:], "Who?")[0] == 0
    code, _, err = run("read", str(book), "-o", str(memory), "--base", base, *MODEL)
    assert code == cli.BAD_INPUT and "--force" in err  # whose text it is cannot be known
    assert run("read", str(book), "--memory", str(memory))[0] == 0
    assert len(file_format.peek(memory)["texts"]) == 2


def test_a_full_disk_at_the_end_saves_elsewhere(
    run: Any,
    base: str,
    book: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import safetensors.torch

    save, memory = safetensors.torch.save_file, tmp_path / "full" / "book.ahn"
    memory.parent.mkdir()
    monkeypatch.setenv("AHN_CACHE", str(tmp_path / "cache"))

    def full(held: Any, path: Any, **options: Any) -> None:
        if Path(path).parent == memory.parent:
            raise OSError(28, "No space left on device")
        save(held, path, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    code, _, err = run("read", str(book), "-o", str(memory), "--base", base, *MODEL, "--archive", "none")
    (rescued,) = (tmp_path / "cache" / "rescued").iterdir()
    assert code == cli.BAD_INPUT and "No space left" in err and str(rescued) in err.splitlines()[-1]
    assert list(memory.parent.iterdir()) == []
    assert run("ask", "--memory", str(rescued), *SMALL[4:], "Who?")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_keep_what_was_read(base: str, tmp_path: Path, number: int) -> None:
    book, memory = tmp_path / "book.txt", tmp_path / "book.ahn"
    book.write_text(TEXT * 400)  # minutes of reading
    argv = ("read", str(book), "-o", str(memory), "--base", base, "--chunk", "64", *MODEL)
    process, stderr = forked(*argv, before=lambda: setattr(_session, "QUIET_S", -1))
    lines: list[str] = []
    for line in stderr:
        lines.append(line)
        if re.match(r"reading [1-9]", line):
            break
    os.kill(process, number)
    os.kill(process, number) if number != signal.SIGINT else None  # as a closing terminal does
    rest = stderr.read()
    stderr.close()
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == cli.INTERRUPTED, (lines, rest)
    assert lines[0].startswith("opening ") and "kept in" in rest.splitlines()[-1]
    seen = file_format.peek(memory)["tokens_seen"]
    assert 0 < seen < 400_000 and seen == file_format.peek(memory)["texts"][0]["tokens"]


@pytest.mark.slow
def test_a_long_text_shows_progress_from_the_start(
    run: Any,
    base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    book = tmp_path / "book.txt"
    book.write_text(TEXT * 40)
    monkeypatch.setattr(_session, "QUIET_S", -1)
    code, _, err = run("read", str(book), "-o", str(tmp_path / "book.ahn"), "--base", base, "--chunk", "4000", *MODEL)
    lines = [line for line in err.splitlines() if line.startswith("reading ")]
    assert code == 0 and lines[0].startswith("reading 0 tokens (0.0% of 122 kB), ")
    assert re.fullmatch(r"reading [\d,]+ tokens \([\d.]+% of 122 kB\), [\d,]+/s, \d+ \w+ left, cache .*", lines[1])
    assert re.fullmatch(r"reading ([\d,]+)/\1 tokens, .*", lines[-1])


def test_what_the_reader_says_of_time() -> None:
    assert [_console.duration(s) for s in (0.4, 59, 61, 3_599, 12_000)] == [
        "0 s",
        "59 s",
        "1 min",
        "1 h 0 min",
        "3 h 20 min",
    ]


@pytest.mark.slow
def test_a_document_that_fails_keeps_those_before_it(
    run: Any,
    base: str,
    book: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One whose first piece is in order, or one of many."""
    monkeypatch.setattr(_reading, "TRIED", 1)
    bad, memory = tmp_path / "bad.pdf", tmp_path / "book.ahn"
    bad.write_bytes(b"%PDF-1.4 nothing")
    book.write_text(TEXT * 40)
    code, _, err = run("read", str(book), str(bad), "-o", str(memory), "--base", base, *MODEL)
    assert code == cli.BAD_INPUT and "bad.pdf" in err.splitlines()[-1] and str(memory) in err.splitlines()[-1]
    assert file_format.peek(memory)["tokens_seen"] > 1000
    assert not file_format.peek(memory)["texts"][0]["complete"]


@pytest.mark.slow
def test_only_the_answer_goes_to_standard_output(base: str, book: Path) -> None:
    command = [sys.executable, "-m", "ahn", "ask", "--document", str(book), "--base", base, *SMALL, "Who sat?"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    tokenizer, model = ahn.load_tokenizer(base), ahn.from_pretrained(base, window=24, sinks=8)
    dialogue = ahn.Dialogue(tokenizer)
    cache = ahn.read(model, dialogue.open(TEXT))
    ids = ahn.generate(model, dialogue.question("Who sat?"), cache, max_new_tokens=8, do_sample=False, pad_token_id=1)
    assert done.stdout == tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"
    assert "answer" in done.stderr


def test_a_stop_while_saving_waits_for_it(
    run: Any,
    base: str,
    book: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import safetensors.torch

    save, memory = safetensors.torch.save_file, tmp_path / "book.ahn"

    def stopped(*args: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        save(*args, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", stopped)
    code, _, err = run("read", str(book), "-o", str(memory), "--base", base, *MODEL, "--archive", "none")
    assert code == cli.INTERRUPTED and f"the memory is kept in {memory}" in err
    assert file_format.peek(memory)["texts"][0]["complete"]


JUNK = {
    "none.pdf": None,
    "empty.txt": b"",
    "junk.pdf": b"%PDF-1.4 junk",
    "junk.docx": b"PK\3\4junk",
    "junk.txt": bytes(99),
}


@pytest.mark.parametrize("name", JUNK)
@pytest.mark.parametrize("command", ["read", "ask", "chat"])
def test_documents_are_tried_before_the_model_is_loaded(
    run: Any,
    base: str,
    book: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    name: str,
) -> None:
    document, content = tmp_path / name, JUNK[name]
    if content is not None:
        document.write_bytes(content)
    monkeypatch.setattr(_session.Session, "__init__", lambda *_: pytest.fail("loaded"))
    given = ["read", str(book), str(document), "-o", str(tmp_path / "out.ahn")]
    if command != "read":
        given = [command, "--document", str(book), "--document", str(document), *(["Who?"] if command == "ask" else [])]
    code, out, err = run(*given, "--base", base, *MODEL)
    assert code == cli.BAD_INPUT and not out and name in err and err.count("\n") == 1


def test_a_pipe_is_not_tried_as_it_could_not_be_read_again(tmp_path: Path) -> None:
    from ahn.documents import check

    os.mkfifo(tmp_path / "pipe")
    check(tmp_path / "pipe")  # would wait for ever for somebody to write
    check("-")


def test_a_document_that_is_there_already_is_skipped(run: Any, base: str, tmp_path: Path, monkeypatch: Any) -> None:
    """By name and text, unless it is forced; a changed one is read."""
    (tmp_path / "notes").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, text in {"a.txt": TEXT, "b.txt": OTHER}.items():
        (tmp_path / "notes" / name).write_text(text)
    code, _, err = run("read", "notes/a.txt", "notes", "-o", "m.ahn", "--base", base, *MODEL)
    assert code == 0 and f"skipped {Path('notes/a.txt')}: named twice; --force reads it again" in err
    names = ["notes/a.txt", "notes/b.txt"]
    assert file_format.peek("m.ahn")["archive"]["documents"] == names

    held = (tmp_path / "m.ahn").read_bytes()
    code, _, err = run("read", "notes", "--memory", "m.ahn")
    assert code == 0 and err.count("in m.ahn already; --force reads it again") == 2 and "nothing new" in err
    code, _, err = run("read", "notes", "--memory", "m.ahn", "-o", "n.ahn")
    assert code == cli.BAD_INPUT and "-o n.ahn: not written, because m.ahn holds all" in err
    assert (tmp_path / "m.ahn").read_bytes() == held and not (tmp_path / "n.ahn").exists()

    (tmp_path / "notes" / "c.txt").write_text(OTHER)
    (tmp_path / "notes" / "b.txt").write_text(OTHER + "And more.")
    code, _, err = run("read", "notes", "--memory", "m.ahn")
    assert code == 0 and [line for line in err.splitlines() if "skipped" in line] == [
        "skipped notes/a.txt: in m.ahn already; --force reads it again"
    ]
    names += ["notes/b.txt", "notes/c.txt"]
    assert file_format.peek("m.ahn")["archive"]["documents"] == names
    assert run("read", "notes/a.txt", "--memory", "m.ahn", "--force")[0] == 0
    assert file_format.peek("m.ahn")["archive"]["documents"] == [*names, "notes/a.txt"]
