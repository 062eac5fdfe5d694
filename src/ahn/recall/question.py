"""A question to a memory, as finders see it: its text, and the queries of the model's heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

NOTHING = "N/A"  # a question about nothing: shows the tokens that heads look at whatever is asked


class _AllSeenError(Exception):
    """Ends a forward call behind the last layer with retrieval heads. Heads of layer 8 need 9 of 28 layers."""


class Question:
    """A question, and values that are computed for it once.

    Args:
        text: the question. model, tokenizer: of the memory.
        memory: is not changed. before: text that is read in front of the question, such as passages found earlier.
    """

    def __init__(self, text: str, model: PreTrainedModel, tokenizer: Any, memory: AHNCache, before: str = "") -> None:
        self.asked, self.model, self.tokenizer, self.memory, self.before = text, model, tokenizer, memory, before
        self._made: dict[str, Any] = {}

    def after(self, before: str) -> Question:
        """The same behind a text."""
        return Question(self.asked, self.model, self.tokenizer, self.memory, before)

    def memo(self, key: str, make: Callable[[], Any]) -> Any:
        """A value that several finders or signals need, made once."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def text(self) -> str:
        """Words to look for."""
        return f"{self.before}\n{self.asked}" if self.before else self.asked

    @cached_property
    def queries(self) -> dict[int, Tensor]:
        """By layer that has retrieval heads, their queries for the tokens of the question, [N, Q, H] on the model's
        device, turned to the distance at which they are held against keys."""
        heads = self.model.ahn_retrieval
        assert heads is not None
        return self.queries_of({layer: heads.queries(layer) for layer in heads.layers}, heads.distance)

    @property
    def nothing(self) -> dict[int, Tensor]:
        """The same of a question about nothing."""
        return Question(NOTHING, self.model, self.tokenizer, self.memory).queries

    @torch.no_grad()
    def queries_of(self, heads: Mapping[int, Sequence[int]], distance: int) -> dict[int, Tensor]:
        """`queries` of the heads in `heads`, by layer, turned to `distance`."""
        found: dict[int, Tensor] = {}
        fork, dialogue = apart(self.memory), Dialogue.of(self.tokenizer)
        ids, tokens = dialogue.question(self.asked, self.before), question_tokens(self.tokenizer, self.asked)

        def observe(index: int, layer: Any, q: Tensor, k: Tensor, span: Any) -> None:
            plain = layer.without_positions(q[:, list(heads[index])], span.positions(q.device))
            found[index] = layer.at_distance(plain, distance)[0, :, tokens]
            if len(found) == len(heads):
                raise _AllSeenError

        for index in heads:
            fork.layers[index].observer = partial(observe, index)
        with suppress(_AllSeenError):
            self.model.get_decoder()(ids.to(self.model.device), **{PAST: fork}, use_cache=True)
        return found


def apart(memory: AHNCache) -> AHNCache:
    """A fork that keeps no archive, to ask and to answer from."""
    fork = memory.fork()
    fork.set_archive(None)
    return fork


def question_tokens(tokenizer: Any, text: str) -> slice:
    """The tokens of `Dialogue.question` that are the question itself, counted from the end."""
    closing = Dialogue.of(tokenizer).closing
    length = len(tokenizer(f" {text.strip()}", add_special_tokens=False, verbose=False).input_ids)
    return slice(-closing - length, -closing or None)
