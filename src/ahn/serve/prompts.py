"""A conversation as token ids, and the passages of a memory that it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ahn.dialogue import SEPARATOR, Dialogue, plain
from ahn.engine.slots import eager
from ahn.memory.cache import AHNCache
from ahn.memory.handle import handle_of
from ahn.recall import Found, Recall, Source, alone, as_text, search
from ahn.serve.errors import ApiError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Prompt:
    """Ids to read and the memory that they follow.

    Attributes:
        ids: int64 [1, T]. found: passages that are read again, and the support for an answer.
        answerable: False if the text supports no answer, so that none is generated.
    """

    ids: Tensor
    memory: AHNCache | None = None
    found: Found | None = None
    answerable: bool = True

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.found.sources if self.found else ()


@dataclass(frozen=True)
class Turns:
    """A conversation: earlier questions with their answers, then the question to be answered."""

    earlier: list[tuple[str, str]]
    question: str

    @classmethod
    def of(cls, messages: Sequence[Any]) -> Turns:
        """System messages stand in front of the next question, and messages of one role in a row are one.

        Raises:
            ApiError: the first message is an answer, or the last one is no question.
        """
        said: list[tuple[str, list[str]]] = []
        for message in messages:
            role = "assistant" if message.role == "assistant" else "user"
            if not said or said[-1][0] != role:
                said.append((role, []))
            said[-1][1].append(message.text)
        texts = [SEPARATOR.join(parts) for _, parts in said]
        if said[0][0] != "user" or said[-1][0] != "user" or messages[-1].role != "user":
            raise ApiError(400, "messages: expected a question first, and one of the user last", "messages", "roles")
        return cls(list(zip(texts[:-1:2], texts[1::2], strict=True)), texts[-1])


def of_base(tokenizer: Any, messages: Sequence[Any]) -> Prompt:
    """A conversation without a memory, by the chat template."""
    dialogue = Dialogue.of(tokenizer)
    if not dialogue.has_template:
        turns = Turns.of(messages)
        return Prompt(_joined(dialogue, turns, opened=False))
    roles = {"developer": "system"}
    plainly = [{"role": roles.get(message.role, message.role), "content": message.text} for message in messages]
    pieces = dialogue.render(plainly, ask=True)
    ids = [id for piece in pieces for id in tokenizer(piece, add_special_tokens=False, verbose=False).input_ids]
    return Prompt(torch.tensor([ids]))


def of_memory(
    model: PreTrainedModel, tokenizer: Any, memory: AHNCache, messages: Sequence[Any], how: Recall, guess: bool
) -> Prompt:
    """A conversation about a memory: a single question as `ahn ask`, a longer one as `ahn chat`. Uses the model.

    Args:
        guess: answer even if the text supports no answer.

    Raises:
        ConfigError: as of `ahn.recall.search`.
    """
    dialogue, turns = Dialogue.of(tokenizer), Turns.of(messages)
    asked = messages[-1].text  # without what stands in front of it

    def chat(text: str, passages: str = "") -> Tensor:
        return _joined(dialogue, Turns(turns.earlier, text), opened=True, passages=passages)

    with eager(handle_of(model)):
        found = search(model, tokenizer, memory, asked, how, prompt=chat if turns.earlier else None)
    answerable = found.supported or guess
    if found.sources and not turns.earlier:
        return Prompt(alone(tokenizer, turns.question, found.sources), None, found, answerable)
    return Prompt(chat(turns.question, as_text(found.sources)), memory, found, answerable)


def of_text(tokenizer: Any, text: str | list[int], memory: AHNCache | None) -> Prompt:
    """A text to go on with, behind a memory or alone."""
    ids = plain(tokenizer, text, special=memory is None).input_ids if isinstance(text, str) else text
    if not ids:
        raise ApiError(400, "prompt: expected at least one token", "prompt", "invalid_value")
    return Prompt(torch.tensor([ids]), memory)


def _joined(dialogue: Dialogue, turns: Turns, opened: bool, passages: str = "") -> Tensor:
    """Ids [1, T] of a conversation. opened: it follows a document. passages: in front of the last question."""
    parts: list[Tensor] = []
    space = "" if dialogue.has_template else " "
    for number, (question, answer) in enumerate([*turns.earlier, (turns.question, "")]):
        before = passages if number == len(turns.earlier) else ""
        if number:
            parts.append(dialogue.turn(question, passages=before))
        else:
            parts.append(dialogue.question(question, before) if opened else dialogue.start(question))
        if number < len(turns.earlier):
            ids = plain(dialogue.tokenizer, space + answer.strip()).input_ids
            parts.append(torch.tensor([ids], dtype=torch.int64))
    return torch.cat(parts, 1)
