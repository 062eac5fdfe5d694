"""Texts and chats as rows of token ids of one length, with the tokens that count.

A source is a file (xz-compressed or not) or a hub dataset:
- `.txt`, `.md`: one text;
- `.jsonl`: a record a line, told apart by its keys: `messages` (a chat: answers count, prompts do not), `text`
  (everything counts), `context` + `qas` or `paragraphs` with `qas` (a document and questions on it: the answers count),
  and LongBench's `context`, `input`, `answers`.
"""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ahn.errors import DocumentError

QUESTIONS = 24  # of a document, at most, in one chat


@dataclass
class Rows:
    """`ids` [rows, T] int32 and `counts` [rows, T] bool: whether the token that follows is to be predicted."""

    ids: Tensor
    counts: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[row].long(), "counts": self.counts[row]}


def rows(sources: list[str], tokenizer: Any, length: int, limit: int | None = None, seed: int = 0) -> Rows:
    """Read sources and pack them.

    Args:
        sources: paths. tokenizer: of the base. length: T of a row. limit: tokens of each source, at most.

    Raises:
        DocumentError: a source is missing, empty, not UTF-8, or of no known shape; nothing fills a row.
    """
    ids, counts = [], []
    for source in sources:
        seen = 0
        packed: list[int] = []
        wanted: list[bool] = []
        for text_ids, text_counts in _documents(source, tokenizer, length, seed):
            packed += text_ids
            wanted += text_counts
            while len(packed) >= length:
                ids.append(torch.tensor(packed[:length], dtype=torch.int32))
                counts.append(torch.tensor(wanted[:length]))
                packed, wanted = packed[length:], wanted[length:]
                seen += length
            if limit is not None and seen >= limit:
                break
        if not seen:
            raise DocumentError(f"{source}: fewer than {length} tokens, not one row")
    return Rows(torch.stack(ids), torch.stack(counts))


def _documents(source: str, tokenizer: Any, length: int, seed: int) -> Iterator[tuple[list[int], list[bool]]]:
    """(ids, counts) of one text after another."""
    chance = random.Random(f"{seed}/{source}")
    if Path(source.removesuffix(".xz")).suffix == ".jsonl":
        for number, line in enumerate(_lines(source), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DocumentError(f"{source}, line {number}: not JSON: {error}") from error
            yield from _record(record, tokenizer, length, chance, f"{source}, line {number}")
    else:
        text = "".join(_lines(source))
        if not text.strip():
            raise DocumentError(f"{source}: empty")
        yield _plain(text, tokenizer)


def _record(
    record: dict[str, Any], tokenizer: Any, length: int, chance: random.Random, where: str
) -> Iterator[tuple[list[int], list[bool]]]:
    if "messages" in record:
        yield _chat(record["messages"], tokenizer)
    elif "text" in record:
        yield _plain(record["text"], tokenizer)
    elif "paragraphs" in record or "qas" in record:
        parts = record.get("paragraphs") or [record]
        text = "\n\n".join(part["context"] for part in parts)
        asked = [(qa["question"], qa["answers"][0]) for part in parts for qa in part["qas"] if qa["answers"]]
        chance.shuffle(asked)
        yield _chat(_questions(text, asked[:QUESTIONS]), tokenizer)
    elif "input" in record and "answers" in record:
        yield _chat(_questions(record["context"], [(record["input"], record["answers"][0])]), tokenizer)
    else:
        raise DocumentError(f"{where}: keys {', '.join(record)}: expected messages, text, qas, or input and answers")


def _questions(text: str, asked: list[tuple[str, str]]) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = []
    for question, answer in asked:
        content = question if messages else f"{text}\n\n{question}"
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def _plain(text: str, tokenizer: Any) -> tuple[list[int], list[bool]]:
    ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return ids, [True] * (len(ids) - 1) + [False]


def _chat(messages: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Only answers count, with the token that ends them. Each turn is rendered by the tokenizer's own template."""
    ids: list[int] = []
    counts: list[bool] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        ask = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        told = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        for text, is_answer in ((ask[len(done) :], False), (told[len(ask) :], True)):
            new = tokenizer(text, add_special_tokens=False).input_ids
            ids += new
            counts += [is_answer] * len(new)
        done = told
    # a token counts when the one after it belongs to an answer
    return ids, [*counts[1:], False]


def _lines(source: str) -> Iterator[str]:
    path = Path(source)
    try:
        with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else open(path, encoding="utf-8") as file:
            yield from file
    except FileNotFoundError as error:
        raise DocumentError(f"{source}: no such file") from error
    except UnicodeDecodeError as error:
        raise DocumentError(f"{source}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except (OSError, lzma.LZMAError) as error:
        raise DocumentError(f"{source}: cannot be read: {error}") from error
