"""A conversation as token ids, and the passages of a memory that it asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ahn.dialogue import SEPARATOR, Dialogue, plain
from ahn.engine.slots import eager
from ahn.memory.cache import AHNCache
from ahn.memory.handle import handle_of
from ahn.recall import Found, Recall, alone, as_text, search
from ahn.serve.errors import ApiError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Prompt:
    """Ids to read and the memory that they follow.

    Attributes:
        ids: int64 [1, T]. plain: the same without passages, as they follow `parent`, to go on from.
        found: passages that are read again, and the support for an answer.
        answerable: False if the text supports no answer, so that none is generated.
    """

    ids: Tensor
    memory: AHNCache | None
    plain: Tensor
    parent: AHNCache | None
    found: Found | None = None
    answerable: bool = True


@dataclass(frozen=True)
class Before:
    """The memory that a question follows: one of texts, or that of a conversation and the ids of its last answer."""

    memory: AHNCache
    answer: list[int] | None = None


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
        return _alone(_joined(dialogue, turns, dialogue.start))
    roles = {"developer": "system"}
    plainly = [{"role": roles.get(message.role, message.role), "content": message.text} for message in messages]
    pieces = dialogue.render(plainly, ask=True)
    ids = [id for piece in pieces for id in tokenizer(piece, add_special_tokens=False, verbose=False).input_ids]
    return _alone(torch.tensor([ids]))


def _alone(ids: Tensor) -> Prompt:
    return Prompt(ids, None, ids, None)


def of_memory(
    model: PreTrainedModel,
    tokenizer: Any,
    before: Before,
    messages: Sequence[Any],
    how: Recall,
    *,
    guess: bool,
) -> Prompt:
    """A conversation about a memory: a single question as `ahn ask`, a longer one as `ahn chat`. Uses the model.

    Args:
        guess: answer even if the text supports no answer.

    Raises:
        ConfigError: as of `ahn.recall.search`.
    """
    dialogue, turns = Dialogue.of(tokenizer), Turns.of(messages)
    memory, answer = before.memory, before.answer
    first = dialogue.question if answer is None else partial(dialogue.turn, answer=answer)
    asked = messages[-1].text  # without what stands in front of it
    is_chat = bool(turns.earlier) or answer is not None

    def chat(text: str, passages: str = "") -> Tensor:
        return _joined(dialogue, Turns(turns.earlier, text), first, passages)

    with eager(handle_of(model)):
        near = _on_device(memory, model)
        found = search(model, tokenizer, near, asked, how, chat if is_chat else None)
    plain, answerable = chat(turns.question), found.supported or guess
    if found.sources and not is_chat:
        return Prompt(alone(tokenizer, turns.question, found.sources), None, plain, memory, found, answerable)
    ids = chat(turns.question, as_text(found.sources)) if found.sources else plain
    return Prompt(ids, memory, plain, memory, found if near.archive is not None else None, answerable)


def _on_device(memory: AHNCache, model: PreTrainedModel) -> AHNCache:
    """The memory where the model is: what the engine gives back is on the host."""
    if model.device.type == "cpu":
        return memory
    homes = [block.self_attn.o_proj.weight.device for block in model.get_decoder().layers]

    def moved(layers: list[Any]) -> list[Any]:
        return [layer.map(lambda t, home=home: t.to(home)) for layer, home in zip(layers, homes, strict=True)]

    return memory.twin(moved)


def of_text(tokenizer: Any, text: str | list[int], memory: AHNCache | None) -> Prompt:
    """A text to go on with, behind a memory or alone."""
    ids = plain(tokenizer, text, special=memory is None).input_ids if isinstance(text, str) else text
    if not ids:
        raise ApiError(400, "prompt: expected at least one token", "prompt", "invalid_value")
    new = torch.tensor([ids])
    return Prompt(new, memory, new, memory)


def _joined(dialogue: Dialogue, turns: Turns, first: Callable[..., Tensor], passages: str = "") -> Tensor:
    """Ids [1, T] of a conversation. first: makes ids of the first question. passages: in front of the last one."""
    parts: list[Tensor] = []
    space = "" if dialogue.has_template else " "
    for number, (question, answer) in enumerate([*turns.earlier, (turns.question, "")]):
        make = dialogue.turn if number else first
        last = number == len(turns.earlier)
        parts.append(make(question, passages=passages) if last and passages else make(question))
        if not last:
            ids = plain(dialogue.tokenizer, space + answer.strip()).input_ids
            parts.append(torch.tensor([ids], dtype=torch.int64))
    return torch.cat(parts, 1)
