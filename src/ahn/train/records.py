"""Turns a record into pieces of text, each with whether its tokens are to be predicted.

The keys of a record say what it is:
- `text`: a text. All of it is to be predicted.
- `messages`: a chat. The assistant's answers are to be predicted. A `document` beside it precedes the first question;
  `answers` beside it answer the last question, the first of them is taken.
- `context` and `qas`, or `paragraphs` of them: a document and questions about it. The answers are to be predicted.
- `context`, `input`, `answers` (LongBench): a document and one question. The first answer is to be predicted.
"""

from __future__ import annotations

import random
import reprlib
from typing import Any, NamedTuple

from ahn.dialogue import Dialogue
from ahn.errors import BaseModelError, ConfigError, DocumentError

QUESTIONS = 24  # about one document, at most, in one chat


class Text(NamedTuple):
    """Pieces that are tokenized one by one and joined, each with whether it is to be predicted."""

    pieces: list[tuple[str, bool]]
    ends: bool  # whether the end-of-text token follows


def from_text(text: str, dialogue: Dialogue) -> Text:
    """A plain text, all of it to be predicted."""
    return Text([(piece, True) for piece in dialogue.inert(text)], ends=True)


def from_record(record: Any, dialogue: Dialogue, chance: random.Random, where: str) -> Text:
    """The pieces of a record.

    Args:
        chance: draws the order of the questions about a document.
        where: the record's place, for messages.

    Raises:
        DocumentError: the record has none of the known keys, or a value of another type.
        BaseModelError: the record is a chat and the tokenizer has no chat template.
    """
    if not isinstance(record, dict):
        raise DocumentError(f"{where}: {type(record).__name__}: expected a record with keys")
    try:
        if "messages" in record:
            return _chat(_conversation(record), dialogue)
        if "text" in record:
            return from_text(_text_of(record, "text"), dialogue)
        if "paragraphs" in record or "qas" in record:
            parts = _list_of(dict, record, "paragraphs") if record.get("paragraphs") else [record]
            text = "\n\n".join(_text_of(part, "context") for part in parts)
            qas = [qa for part in parts for qa in _list_of(dict, part, "qas")]
            asked = [(_text_of(qa, "question"), answers[0]) for qa in qas if (answers := _list_of(str, qa, "answers"))]
            chance.shuffle(asked)
            return _chat(_questions(text, asked[:QUESTIONS]), dialogue)
        if "input" in record and "answers" in record:
            asked = [(_text_of(record, "input"), answer) for answer in _list_of(str, record, "answers")[:1]]
            return _chat(_questions(_text_of(record, "context"), asked), dialogue)
    except KeyError as error:
        raise DocumentError(f"{where}: no {error} where one is expected") from error
    except (AttributeError, IndexError, TypeError, ConfigError) as error:
        raise DocumentError(f"{where}: not of the shape that its keys promise: {error}") from error
    raise DocumentError(f"{where}: keys {', '.join(record)}: expected messages, text, qas, or input and answers")


def _conversation(record: dict[str, Any]) -> list[dict[str, str]]:
    said = _list_of(dict, record, "messages")
    messages = [{key: _text_of(message, key) for key in ("role", "content")} for message in said]
    if record.get("document") is not None and (document := _text_of(record, "document")):
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise TypeError("a document, and no user to ask about it")
        first["content"] = f"{document}\n\n{first['content']}"
    if record.get("answers") and messages and messages[-1]["role"] == "user":
        messages.append({"role": "assistant", "content": _list_of(str, record, "answers")[0]})
    return messages


def _questions(text: str, asked: list[tuple[str, str]]) -> list[dict[str, str]]:
    """A conversation about a text: questions and answers, the text before the first question."""
    messages: list[dict[str, str]] = []
    for question, answer in asked:
        content = question if messages else f"{text}\n\n{question}"
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def _text_of(record: dict[str, Any], key: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise TypeError(f"{key!r} is {reprlib.repr(value)}: expected text")
    return value


def _list_of(kind: type, record: dict[str, Any], key: str) -> list[Any]:
    value = record[key]
    if not (isinstance(value, list) and all(isinstance(item, kind) for item in value)):
        raise TypeError(f"{key!r} is {reprlib.repr(value)}: expected a list of {'texts' if kind is str else 'records'}")
    return value


def _chat(messages: list[dict[str, str]], dialogue: Dialogue) -> Text:
    """A conversation, rendered by the tokenizer's own template. To be predicted are the answers, each with the token
    that ends it."""
    if not dialogue.tokenizer.chat_template:
        raise BaseModelError("the tokenizer of the base has no chat template: expected sources of plain text")
    pieces: list[tuple[str, bool]] = []
    done = [""]
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, answered = dialogue.render(messages[:i], ask=True), dialogue.render(messages[: i + 1])
        pieces += [(piece, False) for piece in _behind(done, asked)]
        pieces += [(piece, True) for piece in _behind(asked, answered)]
        done = answered
    return Text(pieces, ends=False)


def _behind(start: list[str], whole: list[str]) -> list[str]:
    """The pieces of `whole` that come after those of `start`."""
    *before, last = start
    if whole[: len(before)] != before or not whole[len(before)].startswith(last):
        raise ConfigError("the chat template writes the beginning of a conversation anew as it goes on")
    return [whole[len(before)][len(last) :], *whole[len(start) :]]
