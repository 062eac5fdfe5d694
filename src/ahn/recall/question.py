"""A question to a memory, as finders see it: its text, and what the model's heads ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ahn.compat import PAST
from ahn.dialogue import Dialogue
from ahn.memory.cache import AHNCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOTHING = "N/A"  # a question about nothing: what heads look at whatever is asked


class _AllSeenError(Exception):
    """Ends a forward call whose further layers nobody looks at. Heads of layer 8 of 28 need a third of them."""


class Question:
    """Args:
    text: the question. model, tokenizer: of the memory.
    memory: is not changed. before: text that is read in front of the question, such as passages found earlier.
    """

    def __init__(self, text: str, model: PreTrainedModel, tokenizer: Any, memory: AHNCache, before: str = "") -> None:
        self.asked, self.model, self.tokenizer, self.memory, self.before = text, model, tokenizer, memory, before

    def after(self, before: str) -> Question:
        """The same behind a text."""
        return Question(self.asked, self.model, self.tokenizer, self.memory, before)

    @property
    def text(self) -> str:
        """Words to look for."""
        return f"{self.before}\n{self.asked}" if self.before else self.asked

    @cached_property
    def queries(self) -> dict[int, Tensor]:
        """By layer that has retrieval heads, their queries for the tokens of the question, [N, Q, H] on the model's
        device, turned to the distance at which they are held against keys."""
        return self._queries(self.asked, self.before)

    @cached_property
    def nothing(self) -> dict[int, Tensor]:
        """The same of a question about nothing."""
        return self._queries(NOTHING, "")

    def _queries(self, text: str, before: str) -> dict[int, Tensor]:
        heads = self.model.ahn_retrieval
        assert heads is not None
        wanted = {layer: heads.queries(layer) for layer in heads.layers}
        return queries_of(self.model, self.tokenizer, self.memory, text, wanted, heads.distance, before)


def apart(memory: AHNCache) -> AHNCache:
    """A fork that keeps no archive, to ask and to answer from."""
    fork = memory.fork()
    fork.set_archive(None)
    return fork


@torch.no_grad()
def queries_of(
    model: PreTrainedModel,
    tokenizer: Any,
    memory: AHNCache,
    text: str,
    heads: Mapping[int, Sequence[int]],
    distance: int,
    before: str = "",
) -> dict[int, Tensor]:
    """By layer in `heads`, the queries of these heads for the tokens of a question, [N, Q, H], turned to `distance`.
    `before`: text that is read in front of the question. The memory is not changed."""
    found: dict[int, Tensor] = {}
    fork = apart(memory)
    ids, tokens = Dialogue.of(tokenizer).question(text, before), question_tokens(tokenizer, text)

    def observe(index: int, layer: Any, q: Tensor, k: Tensor, span: Any) -> None:
        plain = layer.without_positions(q[:, list(heads[index])], span.positions(q.device))
        found[index] = layer.at_distance(plain, distance)[0, :, tokens]
        if len(found) == len(heads):
            raise _AllSeenError

    for index in heads:
        fork.layers[index].observer = partial(observe, index)
    with suppress(_AllSeenError):
        model.get_decoder()(ids.to(model.device), **{PAST: fork}, use_cache=True)
    return found


def question_tokens(tokenizer: Any, text: str) -> slice:
    """Which tokens of `Dialogue.question` are the question itself, counted from the end."""
    closing = Dialogue.of(tokenizer).closing
    length = len(tokenizer(f" {text.strip()}", add_special_tokens=False, verbose=False).input_ids)
    return slice(-closing - length, -closing or None)
