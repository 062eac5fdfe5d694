"""Loss by position on long texts: PG19 (arXiv 1911.05507), or any text."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from ahn.dialogue import plain
from ahn.errors import EvalError
from ahn.eval.records import SUFFIXES, hub, open_text, read
from ahn.eval.tasks.base import Example, Task

logger = logging.getLogger(__name__)

PG19 = "emozilla/pg19"
TEXT_SUFFIXES = (".txt", ".md", ".txt.xz", ".md.xz")


class Perplexity(Task):
    """The first `length` tokens of each text that has as many, so that every position is a mean over the same texts.

    `pg19` is the test split of the hub unless `data` says otherwise; `text` is `data`: a text file, JSON lines with
    `text`, or a folder of both. Other JSON in a folder is skipped, and so are names that begin with a dot.
    """

    suite = "perplexity"
    sets = ("pg19", "text")
    groups: ClassVar = {}
    kind: ClassVar[Literal["generate", "loss"]] = "loss"

    def examples(
        self, *, tokenizer: Any, length: int | None, data: Path | None, seed: int, limit: int | None
    ) -> Iterator[Example]:
        texts = list(self._texts(data))
        longest = given = 0
        order = list(range(len(texts)))
        if limit is not None:
            self.random(seed, "order").shuffle(order)
        for i in order:
            if given == limit:
                return
            name, text = texts[i]
            offsets = plain(tokenizer, text, return_offsets_mapping=True)
            ends = [end for _, end in offsets.offset_mapping]
            longest = max(longest, len(ends))
            if len(ends) >= (length or 1):
                given += 1
                cut = text if length is None else text[: ends[length - 1]]
                yield Example(id=name, prompt=cut, answers=(), chat=False, max_new_tokens=0)
        if not given:
            raise EvalError(
                f"{self.name}: length {length or 1}: the longest of {len(texts)} texts has {longest} tokens"
            )

    def score(self, example: Example, prediction: str) -> float:
        raise EvalError(f"{self.name}: measures losses, there is no answer to score")

    def _texts(self, data: Path | None) -> Iterator[tuple[str, str]]:
        """Names and texts."""
        if data is None:
            if self.set == "text":
                raise EvalError(f"{self.name}: needs data: a text file, JSON lines with text, or a folder of both")
            for number, record in enumerate(hub(PG19, split="test")):
                yield str(number), record.text("text")
            return
        if not data.exists():
            raise EvalError(f"{data}: no such file or folder; expected the data of {self.name}")
        if data.is_file():
            files = [data]
        else:
            below = sorted(path for path in data.rglob("*") if path.is_file())
            files = [path for path in below if not any(part.startswith(".") for part in path.relative_to(data).parts)]
        files = [path for path in files if path.name.endswith(TEXT_SUFFIXES + SUFFIXES)]
        if not files:
            raise EvalError(f"{data}: no text; expected {', '.join(TEXT_SUFFIXES + SUFFIXES)}")
        for path in files:
            if not path.name.endswith(SUFFIXES):
                yield path.name if data.is_file() else str(path.relative_to(data)), open_text(path)
            elif data.is_file() or _has_texts(path):
                for number, record in enumerate(read(path)):
                    yield f"{path.name}/{number}", record.text("text")


def _has_texts(path: Path) -> bool:
    """Whether a file found in a folder begins with a record that has a text."""
    try:
        next(read(path)).text("text")
    except (EvalError, StopIteration) as error:
        logger.warning("skipped %s", error or path)
        return False
    return True
