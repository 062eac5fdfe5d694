"""Nothing that is typed, piped or pointed at ends in a traceback: one line on standard error, exit code 2."""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ahn import cli

COMMAND = '"""Fail."""\ndef arguments(parser): pass\ndef run(args): raise failure'


class Panic(BaseException):
    """As a panic in Rust arrives: no Exception."""


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a command ends with."""
    try:
        code = cli.main(argv)
    except SystemExit as leaving:
        code = leaving.code
    err = capsys.readouterr().err
    assert code == cli.BAD_INPUT, err
    assert err.endswith("\n") and err.count("\n") == 1 and "error: " in err and len(err) < 800, err
    assert err[:-1].isprintable()
    return err


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A command `fail` that raises the exception given."""

    def fails(failure: BaseException) -> None:
        (tmp_path / "fail.py").write_text(COMMAND)
        monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
        monkeypatch.setattr("builtins.failure", failure, raising=False)
        monkeypatch.delitem(sys.modules, "ahn.cli.fail", raising=False)

    return fails


FAILURES = [
    (RuntimeError("a\nb\n" * 500), "unexpected RuntimeError: a b"),
    (KeyError("x"), "KeyError: 'x'"),
    (RecursionError("maximum recursion depth exceeded"), "RecursionError"),
    (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), "UnicodeEncodeError"),
    (zipfile.BadZipFile("no \x1b[31m zip"), r"BadZipFile: no \x1b[31m zip"),
    (MemoryError(), "out of memory"),
    (OSError(28, "No space left on device"), "No space left"),
    (PermissionError(13, "Permission denied", "/a\nb"), r"/a b: Permission denied"),
    (Panic("called `Option::unwrap()`"), "unexpected Panic"),
]


@pytest.mark.parametrize(("failure", "said"), FAILURES, ids=lambda value: type(value).__name__)
def test_any_exception_is_one_line(
    capsys: Any, failing: Any, monkeypatch: pytest.MonkeyPatch, failure: BaseException, said: str
) -> None:
    failing(failure)
    monkeypatch.delenv("AHN_DEBUG", raising=False)
    line = refused(capsys, "fail")
    assert line.startswith("ahn fail: error: ") and said in line
    assert ("AHN_DEBUG=1" in line) is ("unexpected" in line)
    monkeypatch.setenv("AHN_DEBUG", "1")
    with pytest.raises(type(failure)):
        cli.main(["fail"])


class Full(io.RawIOBase):
    """A file on a full disk."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("buffered", [True, False])
def test_standard_output_on_a_full_disk(capsys: Any, monkeypatch: pytest.MonkeyPatch, buffered: bool) -> None:
    raw: Any = io.BufferedWriter(Full()) if buffered else Full()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "utf-8", write_through=not buffered))
    assert "standard output: No space left on device" in refused(capsys, "cost", "--base", "qwen2.5-3b")


@pytest.mark.parametrize("argv", [["--help"], ["ask", "--help"], ["--version"]], ids=" ".join)
@pytest.mark.parametrize("buffered", [True, False])
def test_help_on_a_full_disk(capsys: Any, monkeypatch: pytest.MonkeyPatch, argv: list[str], buffered: bool) -> None:
    raw: Any = io.BufferedWriter(Full()) if buffered else Full()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "utf-8", write_through=not buffered))
    assert "standard output: No space left on device" in refused(capsys, *argv)


def test_standard_error_on_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(Full(), "utf-8", write_through=True))  # type: ignore[arg-type]
    for argv in (["nonsense"], ["ask", "--nonsense"], ["cost", "--base", "none.json"]):
        assert cli.main(argv) == cli.BAD_INPUT


def test_what_standard_output_cannot_encode_is_escaped(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "ascii", write_through=True))
    with pytest.raises(SystemExit):
        cli.main(["inspect", "--help"])
    assert b"\\u27e6" in out.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("closed", [0, 1, 2])
def test_closed_standard_streams(closed: int, tmp_path: Path) -> None:
    code = (
        f"import os; os.close({closed}); os.execv({sys.executable!r}, [{sys.executable!r}, '-m', 'ahn', 'cost', "
        "'--base', 'qwen2.5-3b'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if closed == 1:
        assert (done.returncode, done.stdout) == (cli.BAD_INPUT, "") and done.stderr.count("\n") == 1
        assert done.stderr.startswith("ahn cost: error: standard output is closed")
    else:
        assert done.returncode == 0 and done.stdout.startswith("qwen2.5-3b: ") and not done.stderr


def test_a_pipe_closed_before_the_end_of_the_process(tmp_path: Path) -> None:
    """A short output is written when the command ends, not by its print."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-m", "ahn", "--help"], stdout=writing, stderr=subprocess.PIPE, env=environment
    )
    os.close(writing)
    assert done.returncode == 0 and not done.stderr


WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.mark.parametrize(
    ("before", "policy"),
    [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"), ({"KMP_BLOCKTIME": "200"}, None), ("torch", None)],
    ids=str,
)
def test_idle_threads_sleep_unless_the_user_says_otherwise(before: Any, policy: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    loaded = "import sys; sys.modules['torch'] = sys; " if before == "torch" else ""
    code = f"{loaded}import ahn, os; print(os.environ.get('OMP_WAIT_POLICY'))"
    environment |= {} if loaded else before
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == str(policy)


DEEP, JUNK = b"[" * 100_000, bytes(range(256)) * 50
CONFIGS = {  # of a model
    "null": "null",
    "list": "[]",
    "deep": DEEP.decode(),
    "negative": '{"model_type": "llama", "hidden_size": -1}',
    "infinite": '{"model_type": "llama", "hidden_size": 1e400}',
    "zero": '{"model_type": "llama", "num_attention_heads": 0}',
    "text": '{"model_type": "llama", "num_hidden_layers": "x"}',
    "types": '{"model_type": ["llama"], "_ahn_implementation": ["x"]}',
    "encoder": '{"model_type": "bert"}',
}
ADAPTERS = {
    "null": "null",
    "deep": DEEP.decode(),
    "version": '{"version": 1}',
    "config": '{"version": 1, "config": [], "shape": 3, "sha256": 1}',
    "cell": '{"version": 1, "config": {"version": 1, "cell": []}, "shape": {}, "sha256": 1}',
}
RESULTS = {
    "list": ("[]", ""),
    "deep": (DEEP.decode(), ""),
    "keys": ('{"version": 1}', ""),
    "rows": ('{"version": 1}', "\0\n"),
}
FILES = {
    "empty": b"",
    "junk": JUNK,
    "deep.json": DEEP,
    "junk.gguf": b"GGUF" + JUNK,
    "new\nline.txt": b"\xff",
    "junk.yaml": JUNK,
}
NAMES = ["", "a\0b", "x" * 5000, "\udcff", "日本", "~nobody-of-this-name/x", "a\nb", "none.txt"]


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files and folders that are of no use to any command."""
    folder = tmp_path_factory.mktemp("things")
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    for kind, known in (("config", CONFIGS), ("ahn", ADAPTERS)):
        for name, text in known.items():
            (folder / f"{kind}-{name}").mkdir()
            (folder / f"{kind}-{name}" / f"{kind}.json").write_text(text)
    for name, (config, rows) in RESULTS.items():
        (folder / f"results-{name}").mkdir()
        (folder / f"results-{name}" / "config.json").write_text(config)
        (folder / f"results-{name}" / "predictions.jsonl").write_text(rows)
    (folder / "folder").mkdir()
    (folder / "book.txt").write_text("The cat sat.")
    return folder


POINTED_AT = [
    ("inspect", "THING"),
    ("inspect", "THING", "--base", "THING"),
    ("convert", "THING", "-o", "TMP/out"),
    ("report", "THING"),
    ("report", "THING", "-o", "TMP/page.html"),
    ("train", "THING"),
    ("chat", "--memory", "THING"),
    ("ask", "--memory", "THING", "Who?"),
    ("ask", "--document", "BOOK", "--base", "THING", "Who?"),
    ("ask", "--document", "BOOK", "--adapter", "THING", "--base", "TMP", "Who?"),
    ("ask", "--document", "THING", "--base", "TMP", "Who?"),
    ("read", "THING", "-o", "TMP/memory.ahn", "--base", "TMP"),
    ("eval", "--tasks", "THING"),
    ("eval", "--tasks", "perplexity/text", "--base", "THING"),
    ("eval", "--tasks", "longbench/qmsum", "--data", "THING", "--base", "TMP"),
]


@pytest.mark.slow
@pytest.mark.parametrize("argv", POINTED_AT, ids=" ".join)
def test_whatever_is_pointed_at(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, things: Path, tmp_path: Path, argv: tuple[str, ...]
) -> None:
    """Files, folders and names that are not what a command takes."""
    monkeypatch.setenv("AHN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(things / "folder")
    names = {"TMP": str(tmp_path), "BOOK": str(things / "book.txt")}
    folders = "--base THING" in " ".join(argv) or "--adapter" in argv or argv[0] in ("convert", "report")
    found = [path for path in sorted(things.iterdir()) if path.name != "book.txt" and (folders or path.is_file())]
    for thing in [*map(str, found), *NAMES]:
        words = [thing if word == "THING" else word for word in argv]
        for name, value in names.items():
            words = [word.replace(name, value) if word.startswith(name) else word for word in words]
        line = refused(capsys, *words)
        assert "unexpected" not in line, (thing[:200], line)


NUMBERS = ["nan", "inf", "1e400", "-1", "0x10", "", "1.5", "9" * 5000]
NUMBERED = [
    ("cost", "--length"),
    ("cost", "--window"),
    ("cost", "--sinks"),
    ("cost", "--bytes"),
    ("cost", "--store", "recency", "--store-size"),
    ("ask", "Who?", "--document", "none.txt", "--chunk"),
    ("ask", "Who?", "--document", "none.txt", "--max-new-tokens"),
    ("eval", "--tasks", "squad/0", "--seed"),
    ("inspect", "none.ahn", "--layer"),
]


@pytest.mark.parametrize("argv", NUMBERED, ids=" ".join)
def test_whatever_is_typed_as_a_number(capsys: Any, argv: tuple[str, ...]) -> None:
    for number in NUMBERS:
        assert "unexpected" not in refused(capsys, *argv, number)


@pytest.mark.parametrize("home", ["a file", "unset"])
def test_without_a_home(capsys: Any, monkeypatch: pytest.MonkeyPatch, things: Path, home: str) -> None:
    """Only what needs the cache folder is refused, by name."""
    from gguf import GGUFWriter

    path = things.parent / "llama.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("output_norm.weight", np.ones(32, dtype=np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    for name in ("AHN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(things / "junk"))
    if home == "unset":
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert cli.main(["cost", "--base", "qwen2.5-3b"]) == 0
    capsys.readouterr()
    line = refused(capsys, "ask", "--document", str(things / "book.txt"), "--base", str(path), "Who?")
    assert "AHN_CACHE can name another folder" in line


def test_a_gguf_file_without_weights(capsys: Any, things: Path, tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "none.gguf", "llama")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    base = str(tmp_path / "none.gguf")
    assert "no weights" in refused(capsys, "ask", "--document", str(things / "book.txt"), "--base", base, "Who?")


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["read", "-o", "dash.ahn", "--", "-dash.txt", "--force"], "document", ["-dash.txt", "--force"]),
        (["read", "a.txt", "-o", "dash.ahn", "--", "-dash.txt"], "document", ["a.txt", "-dash.txt"]),
        (["ask", "--document", "x", "--", "-x?"], "question", ["-x?"]),
        (["ask", "--document", "x", "--", "--document"], "question", ["--document"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_words_behind_two_dashes_are_no_options(argv: list[str], name: str, value: Any) -> None:
    assert getattr(cli._parse(argv), name) == value
