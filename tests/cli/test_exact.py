"""Texts that fit are kept exactly: the window of a new memory is chosen from the size of the documents."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import ahn
from ahn import cli, texts
from ahn.cli import _options
from ahn.errors import DocumentError
from ahn.memory import file_format
from ahn.tokens import Encoded
from commands import TEXT, interrupt_reading, type_in

SHORT = TEXT[: len(TEXT) // 10]  # some 200 tokens; the tiny base has 512 positions, of which it keeps 128 by default


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "short.txt"
    path.write_text(SHORT)
    return path


def settings(memory: Path) -> dict[str, Any]:
    found: dict[str, Any] = file_format.peek(memory)["config"]
    return found


def test_a_text_that_fits_is_answered_as_by_full_attention(run: Any, base: str, book: Path) -> None:
    from transformers import AutoModelForCausalLM

    code, out, err = run("ask", "--document", str(book), "--base", base, "--max-new-tokens", "8", "Who sat?")
    tokenizer, model = ahn.load_tokenizer(base), AutoModelForCausalLM.from_pretrained(base)
    dialogue = ahn.Dialogue(tokenizer)
    ids = torch.cat([dialogue.open(SHORT), dialogue.question("Who sat?")], 1)
    count = dialogue.open(SHORT).shape[1]
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    assert (code, out.strip()) == (0, tokenizer.decode(expected, skip_special_tokens=True).strip())
    assert f"exact: all {count:,} tokens, room for 512" in err and f"kept exactly: all {count:,} tokens; cache" in err


@pytest.mark.parametrize("sizes", [["--exact", "0"], ["--exact", "40kB"], ["--window", "24"], ["--lossless", "100"]])
def test_sizes_that_are_given_decide(
    run: Any,
    base: str,
    book: Path,
    tmp_path: Path,
    sizes: list[str],
) -> None:
    memory = tmp_path / "m.ahn"
    code, _, err = run("read", str(book), "-o", str(memory), "--base", base, *sizes)
    assert code == 0 and "kept exactly" not in err
    assert settings(memory)["window"] < 150


def test_the_default_window_may_be_enough(run: Any, base: str, tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("A cat sat.")
    code, _, err = run(
        "read", str(tmp_path / "tiny.txt"), "-o", str(tmp_path / "m.ahn"), "--base", base, "--exact", "0"
    )
    assert code == 0 and "kept exactly: all" in err and settings(tmp_path / "m.ahn")["window"] == 120


def test_a_text_that_does_not_fit_the_positions(run: Any, base: str, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(TEXT)
    code, _, err = run("read", str(tmp_path / "long.txt"), "-o", str(tmp_path / "m.ahn"), "--base", base)
    assert code == 0 and "kept exactly" not in err and settings(tmp_path / "m.ahn")["window"] == 120


def test_what_is_appended_stays_exact_while_there_is_room(
    run: Any,
    base: str,
    book: Path,
    tmp_path: Path,
) -> None:
    memory = tmp_path / "m.ahn"
    assert run("read", str(book), "-o", str(memory), "--base", base)[0] == 0
    window = settings(memory)["window"]
    for more, exact in ((SHORT, True), (TEXT, False)):
        (tmp_path / "more.txt").write_text(more)
        code, _, err = run("read", str(tmp_path / "more.txt"), "--memory", str(memory))
        assert code == 0 and ("kept exactly: all" in err) == exact
        assert bool(re.search(r"exact   no longer all: [\d,]+ tokens are more than the room for 512", err)) != exact
        assert settings(memory)["window"] == window
    code, _, err = run("ask", "--memory", str(memory), "--exact", "1GB", "Who?")
    assert code == cli.BAD_INPUT and err.count("\n") == 1 and "--exact" in err and "leave the option out" in err


def test_a_stopped_reading_goes_on_exactly(
    run: Any,
    base: str,
    book: Path,
    tmp_path: Path,
) -> None:
    memory, options = tmp_path / "m.ahn", ["--base", base, "--chunk", "50"]
    with pytest.MonkeyPatch.context() as patch:
        interrupt_reading(patch, 100)
        assert run("read", str(book), "-o", str(memory), *options)[0] == cli.INTERRUPTED
    code, _, err = run("read", str(book), "-o", str(memory), *options)
    assert code == 0 and "resumed" in err and "kept exactly: all" in err


def test_of_a_pipe_only_an_end_in_sight_is_known(run: Any, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    type_in(monkeypatch, SHORT)
    code, _, err = run("ask", "--document", "-", "--base", base, "--max-new-tokens", "1", "Who?")
    assert code == 0 and "kept exactly: all" in err


class Blocks:
    """As a tokenizer gives them, each long enough to be counted; `given` says how many were asked for."""

    def __init__(self, count: int, size: int | None) -> None:
        self.count, self.bytes, self.given, self.documents = count, size, 0, []

    def __iter__(self) -> Any:
        import numpy as np

        for _ in range(self.count):
            self.given += 1
            yield Encoded(np.zeros(1000, np.int32), np.zeros(1000, np.int64))
        if self.count == 5:
            raise DocumentError("page 5 is damaged")


@pytest.mark.parametrize(
    ("count", "size", "most", "total", "given"),
    [
        (4, 100, 4000, 4000, 4),
        (4, 100, 3999, None, 4),
        (9, 100, 3999, None, 4),
        (4, None, 4000, None, 2),
        (1, None, 4000, 1000, 1),
        (5, 100, 9000, None, 5),
    ],
)
def test_how_far_is_looked_ahead(count: int, size: int | None, most: int, total: int | None, given: int) -> None:
    blocks: Any = Blocks(count, size)
    text = texts.Text(iter(blocks), blocks)
    assert text.within(most) == total and blocks.given == given
    if count == 5:  # what stands before the damage is read first: it is looked two blocks ahead
        assert [len(next(text)) for _ in range(3)] == [1000] * 3
        with pytest.raises(DocumentError, match="page 5"):
            next(text)
    else:
        assert sum(len(piece) for piece in text) == 1000 * count


def test_sizes_in_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    for text, expected in (("0", 0), ("512MB", 512_000_000), ("1.5 g", 1_500_000_000), ("20kb", 20_000), ("7", 7)):
        assert _options.byte_count(text) == expected
    for argv in (["--exact", "much"], ["--exact", "-1"], ["--exact", "1GB", "--window", "9"]):
        with pytest.raises(SystemExit) as leaving:
            cli.main(["read", "a.txt", "-o", "m.ahn", *argv])
        assert leaving.value.code == cli.BAD_INPUT and "--exact" in capsys.readouterr().err
