"""Nothing that is typed, piped or pointed at ends in a traceback: one line on standard error, exit code 2."""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

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


def test_what_standard_output_cannot_encode_is_escaped(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "ascii", write_through=True))
    with pytest.raises(SystemExit):
        cli.main(["inspect", "--help"])
    assert b"\\u27e6" in out.getvalue()


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
