import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ahn
from ahn import bases, cli
from ahn.cli import _session
from ahn.cli.info import report
from ahn.dialogue import Dialogue
from commands import SMALL, TEXT, interrupt_reading, type_in
from conftest import with_memory


@pytest.fixture
def book(tmp_path: Path) -> str:
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(autouse=True)
def _verbosity() -> Iterator[None]:
    """The commands quieten transformers, in a process of their own."""
    import transformers

    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)


def test_help_names_every_command_and_loads_no_torch() -> None:
    code = "import sys\nfrom ahn.cli import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"ask", "chat", "read"} <= set(cli.names())
    assert all(f"\n    {name} " in done.stdout for name in cli.names())


@pytest.mark.parametrize("name", cli.names())
def test_every_command_has_help(run: Any, name: str) -> None:
    code, out, _ = run(name, "--help")
    assert code == 0 and out.startswith(f"usage: ahn {name}")


def test_version(run: Any) -> None:
    assert run("--version")[:2] == (0, f"ahn {ahn.__version__}\n")


def test_a_new_command_is_a_new_file(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = 'def arguments(parser): parser.add_argument("name")'
    (tmp_path / "hello.py").write_text(f'"""Say hello."""\n{arguments}\ndef run(args): print("hello", args.name)\n')
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    assert run("hello", "you") == (0, "hello you\n", "")
    assert "Say hello." in run("--help")[1]


def test_an_unknown_kernel_is_said_before_anything_is_loaded(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AHN_KERNEL", "flsh")
    code, out, err = run("ask", "--document", "no-such-file", "Who?")
    assert (code, out) == (2, "")
    assert err.startswith(
        "ahn ask: error: AHN_KERNEL=flsh: no kernel flsh; expected auto or torch alone, or some of fla"
    )


def test_ask_a_document(run: Any, base: str, book: str) -> None:
    code, out, err = run("ask", "--document", book, "--base", base, *SMALL, "Who", "sat?")
    assert code == 0
    assert out.strip()
    notice, read, answer = err.splitlines()
    assert notice.startswith("no trained memory") and "window with sinks only" in notice
    assert re.fullmatch(
        r"read +[\d,]+ tokens in [\d.]+ s \([\d,]+ tokens/s\); cache .+ would hold .+B; archive .+B on the host", read
    )
    assert run("ask", "--document", book, "--base", base, *SMALL, "--recall", "0", "Who sat?")[:2] == (0, out)
    wider = *SMALL, "--window", "150", "--recall", "99"
    code, _, err = run("ask", "--document", book, "--base", base, *wider, "--sources", "Who sat?")
    assert code == 0 and re.search(
        r"^recall +(1 passage|\d+ passages), [\d,]+ tokens, found in [\d.]+ s$", err, re.MULTILINE
    )
    assert re.search(rf"^\[1\] +{re.escape(book)}, character [\d,]+$", err, re.MULTILINE)
    assert re.fullmatch(r"answer +8 tokens in [\d.]+ s \([\d.,]+ tokens/s\), cut at --max-new-tokens", answer)


def test_ask_standard_input(run: Any, base: str, book: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run("ask", "--document", book, "--base", base, *SMALL, "Who sat?")[1]
    type_in(monkeypatch, TEXT)
    assert run("ask", "--document", "-", "--base", base, *SMALL, "Who sat?")[:2] == (0, expected)


def test_read_once_and_ask_later(run: Any, base: str, book: str, tmp_path: Path) -> None:
    memory = str(tmp_path / "book.ahn")
    code, out, err = run("read", book, "-o", memory, "--base", base, *SMALL[:4])
    assert code == 0 and not out
    assert f"saved   {memory}" in err and "tokens/s" in err
    at_once = run("ask", "--document", book, "--base", base, *SMALL, "Who sat?")[1]
    code, later, err = run("ask", "--memory", memory, *SMALL[4:], "Who sat?")  # base, window and sinks are in the file
    assert (code, later) == (0, at_once)
    assert memory in err and "answer" in err


def test_ask_can_keep_what_it_reads(run: Any, base: str, book: str, tmp_path: Path) -> None:
    memory = tmp_path / "book.ahn"
    _, out, _ = run("ask", "--document", book, "-o", str(memory), "--base", base, *SMALL, "Who sat?")
    assert run("ask", "--memory", str(memory), *SMALL[4:], "Who sat?")[:2] == (0, out)


def test_memory_of_a_trained_adapter(run: Any, base: str, book: str, tmp_path: Path) -> None:
    adapter, memory, merged = (str(tmp_path / name) for name in ("adapter", "book.ahn", "merged"))
    model = with_memory(bases.load_base(base), window=24, sinks=8)
    ahn.save_adapter(model, adapter)
    trained = ("--adapter", adapter, "--base", base)
    code, out, err = run("ask", "--document", book, *trained, "-o", memory, *SMALL, "Who sat?")
    assert code == 0 and "no trained memory" not in err
    assert run("ask", "--memory", memory, *SMALL[4:], "Who sat?")[:2] == (0, out)

    code, said, _ = run("convert", adapter, "-o", merged, "--base", base)
    assert code == 0 and merged in said
    code, again, err = run("ask", "--document", book, "--base", merged, *SMALL, "Who sat?")
    assert (code, again) == (0, out) and "no trained memory" not in err


def test_progress_without_a_terminal_is_plain_lines(
    run: Any, base: str, book: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_session, "QUIET_S", -1)
    code, out, err = run("ask", "--document", book, "--base", base, "--chunk", "200", *SMALL, "Who sat?")
    lines = [line for line in err.splitlines() if line.startswith("reading ")]
    assert code == 0 and len(lines) > 3 and "reading" not in out
    pattern = r"reading [\d,]+/[\d,]+ tokens, [\d,]+/s, cache \S+ \S+ \(full attention \S+ \S+\)"
    assert all(re.fullmatch(pattern, line) for line in lines)


def test_chat_carries_the_memory_over_turns(
    run: Any, base: str, book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = str(tmp_path / "book.ahn")
    first = run("ask", "--document", book, "-o", memory, "--base", base, *SMALL, "Who sat?")[1]
    type_in(monkeypatch, "Who sat?\n\nWhere?\nexit\nnot asked\n")
    code, out, err = run("chat", "--memory", memory, *SMALL[4:])
    assert code == 0 and out.startswith(first) and len(out) > len(first)
    assert err.count("tokens/s") == 2
    for leave in ("/quit", "/exit", "/quit now"):
        type_in(monkeypatch, f"/help\nHello\n{leave}\nnot asked\n")
        code, _, err = run("chat", "--base", base, *SMALL)
        assert code == 0 and err.count("tokens/s") == 1 and "/quit, /exit or Ctrl-D leaves" in err


def test_chat_in_a_terminal(run: Any, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pasted lines are one message, Ctrl-C clears the line, an unknown command is refused, Ctrl-D leaves."""
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input

    asked: list[str] = []
    start, turn = Dialogue.start, Dialogue.turn
    monkeypatch.setattr(Dialogue, "start", lambda self, text: asked.append(text) or start(self, text))
    monkeypatch.setattr(Dialogue, "turn", lambda self, text, *rest: asked.append(text) or turn(self, text, *rest))
    type_in(monkeypatch, "")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with create_pipe_input() as keys, create_app_session(input=keys):
        keys.send_text("\x1b[200~Who sat?\nAnd where?\x1b[201~\rnever sent\x03/foo\r/ext now\rWhy?\r\x04")
        code, _, err = run("chat", "--base", base, *SMALL)
    assert code == 0 and list(dict.fromkeys(asked)) == ["Who sat?\nAnd where?", "Why?"]
    assert "unknown command /foo: expected /exit, /help, /quit\n" in err
    assert "unknown command /ext: expected /exit, /help, /quit; did you mean '/exit'?" in err


def test_chat_of_bytes_that_are_no_text(run: Any, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Who \xff sat?\n/etc/passwd is long\n/foo\n")))
    code, _, err = run("chat", "--base", base, *SMALL, "--window", "64")
    assert code == 0 and err.count("tokens/s") == 2 and "unknown command /foo" in err


@pytest.mark.parametrize("question", ["Who \udcff sat?", "Who \ud800?", "\udcc3\udca9 <|end|>"])
def test_questions_of_bytes_that_are_no_text(run: Any, base: str, book: str, question: str) -> None:
    code, out, _ = run("ask", "--document", book, "--base", base, *SMALL, question)
    assert code == 0 and out


def test_turns_are_one_conversation(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What the memory has seen after two turns is what the chat template makes of them."""
    parser = cli.argparse.ArgumentParser()
    cli._options.add_model(parser)
    args = parser.parse_args(["--base", base, "--window", "400", "--sinks", "8"])
    session = _session.Session(args)
    start = session.dialogue.start("Who sat?")
    first = session.answer(start, 5)
    turn = session.dialogue.turn("Where?", first.ids[0])
    second = session.answer(turn, 5)
    whole = torch.cat([start, first.ids, turn], 1)
    expected = bases.load_base(base).generate(
        whole, attention_mask=torch.ones_like(whole), max_new_tokens=5, do_sample=False, pad_token_id=1
    )
    assert second.ids.tolist() == expected[:, whole.shape[1] :].tolist()


def test_interrupted_reading_keeps_what_it_has(
    run: Any, base: str, book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tmp_path / "book.ahn"
    interrupt_reading(monkeypatch, after=300)
    code, out, err = run("read", book, "-o", str(memory), "--base", base, "--chunk", "100", *SMALL[:4])
    assert code == cli.INTERRUPTED and not out
    assert re.fullmatch(
        rf"interrupted after 300 of [\d,]+ tokens, which are kept in {re.escape(str(memory))}", err.splitlines()[-1]
    )
    code, out, err = run("ask", "--memory", str(memory), *SMALL[4:], "Who sat?")
    assert code == 0 and "300 tokens" in err


def test_interrupted_reading_says_how_to_keep_it(
    run: Any, base: str, book: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_reading(monkeypatch, after=300)
    code, out, err = run("ask", "--document", book, "--base", base, "--chunk", "100", *SMALL, "Who sat?")
    assert code == cli.INTERRUPTED and not out
    assert "300 of" in err.splitlines()[-1] and "-o FILE" in err.splitlines()[-1]


@pytest.mark.parametrize("command", ["ask", "chat"])
def test_interrupted_answer(run: Any, base: str, book: str, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    import transformers

    put, calls = transformers.TextStreamer.put, []

    def interrupting(self: Any, value: Any) -> None:
        calls.append(value)
        if len(calls) == 4:  # the prompt and three tokens; whether to stop is asked behind each
            signal.raise_signal(signal.SIGINT)
        put(self, value)

    monkeypatch.setattr(transformers.TextStreamer, "put", interrupting)
    if command == "ask":
        code, _, err = run("ask", "--document", book, "--base", base, *SMALL, "Who sat?")
        assert code == cli.INTERRUPTED
    else:  # only this answer ends
        type_in(monkeypatch, "Who sat?\nWhere?\n")
        code, _, err = run("chat", "--base", base, *SMALL)
        assert code == 0 and err.count("tokens/s") == 2
    assert re.search(r"\b3 tokens in", err)


def test_full_disk_keeps_the_earlier_memory(
    run: Any, base: str, book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    memory = tmp_path / "book.ahn"
    memory.write_text("earlier")

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save", full)
    code, _, err = run("read", book, "-o", str(memory), "--force", "--base", base, *SMALL[:4])
    assert code == cli.BAD_INPUT and "No space left" in err.splitlines()[-1]
    assert memory.read_text() == "earlier" and [path.name for path in tmp_path.glob("*ahn*")] == ["book.ahn"]


def test_info(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run("info")
    assert code == 0
    assert torch.__version__ in out
    assert all(name in out for name in ahn.cells.names())
    assert "smollm2-135m" in out
    assert all(reason in out for _, _, reason in report())


def test_info_shows_the_variables_that_are_set(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ahn` sets some of them itself."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setenv("FLA_CONFIG_DIR", "/forms")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    _, out, _ = run("info")
    assert "OMP_WAIT_POLICY=passive" in out and "FLA_CONFIG_DIR=/forms" in out and "GOMP_SPINCOUNT" not in out


def test_cost_shows_the_papers_numbers(run: Any) -> None:
    code, out, _ = run("cost", "--base", "qwen2.5-3b", "--length", "128000", "--window", "32640", "--sinks", "128")
    assert code == 0
    assert re.search(r"cache saved +74\.0%", out)
    assert re.search(r"FLOPs saved +40\.6%", out)  # 40.57; the paper cuts it to 40.5
    assert re.search(r"token mixing +2,502\.\d+ T +1,169\.\d+ T +46\.7%", out)
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("options", [("--cell", "none"), ("--cell", "mamba2", "--bytes", "2"), ("--length", "10")])
def test_cost_of_a_config_file(run: Any, base: str, options: tuple[str, ...]) -> None:
    code, out, _ = run("cost", "--base", f"{base}/config.json", *options)
    assert code == 0 and "2 layers" in out
    assert ("memory state" in out) is ("none" not in options)


@pytest.mark.slow
def test_a_closed_pipe_is_no_error(base: str) -> None:
    command = "import sys; from ahn.cli import main; sys.exit(main(['cost', '--base', 'qwen2.5-3b']))"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", command], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert done.returncode == 0 and not done.stderr


DOCUMENT = ["ask", "--document", "BOOK"]
BAD = [
    (["aks"], "unknown command 'aks'", "did you mean 'ask'?"),
    (["ask", "--docment", "BOOK", "Who?"], "unknown option --docment", "did you mean '--document'?"),
    (["ask", "Who?"], "--document --memory", "required"),
    (DOCUMENT, "question", "required"),
    ([*DOCUMENT, " "], "question ' '", "expected some text"),
    ([*DOCUMENT, "--memory", "x", "Who?"], "--memory", "not allowed with"),
    (["ask", "--document", "TMP/none.txt", "Who?"], "none.txt", "no such file"),
    (["ask", "--document", "TMP/*.odd", "Who?"], ".odd", "no "),
    ([*DOCUMENT, "--base", "nonsense", "Who?"], "nonsense", "expected"),
    ([*DOCUMENT, "--base", "BASE", "--window", "400", "--sinks", "200", "Who?"], "600", "at most 512"),
    ([*DOCUMENT, "--base", "BASE", "--cell", "mamba", "Who?"], "'mamba'", "did you mean 'mamba2'?"),
    ([*DOCUMENT, "--base", "BASE", "--dtype", "int8", "Who?"], "int8", "expected"),
    ([*DOCUMENT, "--base", "BASE", "--device", "gpu", "Who?"], "device gpu", "expected cpu"),
    ([*DOCUMENT, "--base", "BASE", "--adapter", "TMP", "Who?"], "TMP", "expected"),
    ([*DOCUMENT, "--base", "BASE", "--adapter", "qwen", "Who?"], "qwen: no such", "did you mean 'qwen2.5-coder"),
    (["ask", "--memory", "TMP/none.ahn", "Who?"], "none.ahn", "no such memory file"),
    (["ask", "--memory", "BOOK", "Who?"], "book.txt", "not a memory file"),
    (["ask", "--memory", "MEMORY", "--window", "16", "Who?"], "--window 16", "--window 24"),
    (["ask", "--memory", "MEMORY", "-o", "x.ahn", "Who?"], "-o x.ahn", "goes with --document"),
    (["ask", "--memory", "CUT", "Who?"], "cut.ahn", "truncated"),
    (["read", "BOOK"], "--output", "required"),
    (["read", "BOOK", "-o", "TMP"], "TMP", "is a folder"),
    (["read", "BOOK", "-o", "TMP/none/book.ahn"], "none", "no folder"),
    (["chat", "--document", "-"], "--document -", "expected a file"),
    (["chat", "-o", "x.ahn"], "-o x.ahn", "goes with --document"),
    (["cost", "--cell", "mamba", "--base", "qwen2.5-3b"], "'mamba'", "did you mean 'mamba2'?"),
    (["cost", "--base", "qwen2.5-8b"], "qwen2.5-8b", "did you mean 'qwen2.5-"),
    (["cost", "--base", "TMP/config.json"], "config.json", "cannot"),
    (["convert", "TMP", "-o", "TMP/out"], "TMP", "no adapter"),
    (["convert", "TMP"], "--output", "required"),
]
BAD += [([*DOCUMENT, "--window", value, "Who?"], repr(value), "at least 1") for value in ("0", "-3", "1.5", "x")]
BAD += [([*DOCUMENT, "--sinks", value, "Who?"], repr(value), "at least 0") for value in ("-1", "0.5", "")]
BAD += [(["cost", "--length", "0"], "'0'", "at least 1"), (["ask", "--max-new-tokens", "0"], "'0'", "at least 1")]


@pytest.fixture(scope="module")
def memory(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    (folder / "book.txt").write_text(TEXT)
    argv = ["read", str(folder / "book.txt"), "-o", str(folder / "book.ahn"), "--base", base, *SMALL[:4]]
    assert cli.main(argv) == 0
    return folder / "book.ahn"


@pytest.mark.parametrize(("argv", "value", "allowed"), BAD, ids=[" ".join(argv) for argv, _, _ in BAD])
def test_bad_input_is_one_line_that_names_it(
    run: Any, base: str, book: str, memory: Path, tmp_path: Path, argv: list[str], value: str, allowed: str
) -> None:
    cut = tmp_path / "cut.ahn"
    cut.write_bytes(memory.read_bytes()[:5000])
    names = {"BOOK": book, "BASE": base, "MEMORY": str(memory), "CUT": str(cut), "TMP": str(tmp_path)}

    def filled(text: str) -> str:
        return re.sub("|".join(names), lambda match: names[match[0]], text)

    code, out, err = run(*map(filled, argv))
    said = err.splitlines()
    assert code == cli.BAD_INPUT and not out
    assert said[-1].startswith("ahn") and filled(value) in said[-1] and allowed in said[-1]
    assert not [line for line in said[:-1] if not line.startswith("no trained memory")]


def test_memory_of_another_model(run: Any, memory: Path, tmp_path: Path, base: str) -> None:
    other = tmp_path / "other"
    model = bases.load_base(base)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.1)
    model.save_pretrained(other)
    ahn.load_tokenizer(base).save_pretrained(other)
    code, out, err = run("ask", "--memory", str(memory), "--base", str(other), "Who sat?")
    assert code == cli.BAD_INPUT and not out
    assert "another model" in err.splitlines()[-1]


def test_config_with_a_missing_size(run: Any, base: str, tmp_path: Path) -> None:
    values = json.loads((Path(base) / "config.json").read_text())
    del values["intermediate_size"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    code, _, err = run("cost", "--base", str(tmp_path / "config.json"))
    assert code == cli.BAD_INPUT and "intermediate_size" in err


def test_training_looks_for_its_data_before_it_loads_anything(run: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: no-such-base\ndata: [{tmp_path / 'none.txt'}]\noutput: {tmp_path / 'run'}\n")
    code, _, err = run("train", str(recipe))
    assert code == cli.BAD_INPUT and "none.txt: no such file" in err
    assert not (tmp_path / "run").exists()
