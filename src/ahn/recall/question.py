"""A question to a memory, as finders see it: its text, and what the model's heads ask for."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ahn.cache import PAST, AHNCache
from ahn.dialogue import Dialogue

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOTHING = "N/A"  # a question about nothing: what heads look at whatever is asked


class Question:
    """Args:
    text: the question. model, tokenizer: of the memory.
    memory: is not changed. before: text that is read in front of the question, such as passages found earlier.
    """

    def __init__(self, text: str, model: PreTrainedModel, tokenizer: Any, memory: AHNCache, before: str = "") -> None:
        self.asked, self.model, self.tokenizer, self.memory, self.before = text, model, tokenizer, memory, before
        self._dialogue = Dialogue.of(tokenizer)

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

    @torch.no_grad()
    def _queries(self, text: str, before: str) -> dict[int, Tensor]:
        heads = self.model.ahn_retrieval
        assert heads is not None
        found: dict[int, Tensor] = {}
        fork = self.memory.fork()
        fork.set_archive(None)
        ids, tokens = self._dialogue.question(text, before), question_tokens(self.tokenizer, text)

        def observe(index: int, layer: Any, q: Tensor, span: Any) -> None:
            wanted = q[:, heads.queries(index)]
            plain = layer.without_positions(wanted, span.positions(q.device))
            turned = layer.at_distance(plain, heads.distance)
            found[index] = turned[0, :, tokens]

        for index in heads.layers:
            fork.layers[index].observer = lambda layer, q, k, span, index=index: observe(index, layer, q, span)
        self.model.get_decoder()(ids.to(self.model.device), **{PAST: fork}, use_cache=True)
        return found


def question_tokens(tokenizer: Any, text: str) -> slice:
    """Which tokens of `Dialogue.question` are the question itself, counted from the end."""
    closing = Dialogue.of(tokenizer).closing
    length = len(tokenizer(f" {text.strip()}", add_special_tokens=False, verbose=False).input_ids)
    return slice(-closing - length, -closing or None)
