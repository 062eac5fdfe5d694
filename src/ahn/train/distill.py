"""The loss of self-distillation, and the two forwards it compares.

Letters: B batch, T tokens, D hidden size, V vocabulary, C tokens at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ahn.augmentation import full_attention

TOKENS_AT_ONCE = 2048  # logits of so many tokens exist at a time


def loss(model: Any, ids_BT: Tensor, counts_BT: Tensor, kind: str = "kl") -> Tensor:
    """Mean loss over the tokens that count and lie behind the lossless ones.

    Args:
        model: augmented; the window and sinks it has now are those of this batch.
        ids_BT: whole sequences, no padding in front.
        counts_BT: bool, whether the token that FOLLOWS is to be predicted (false: a prompt, or padding).
        kind: "kl", KL(teacher || student) of the next token; "ce", cross-entropy with the text itself.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings().weight
    counts = counts_BT.clone()
    counts[:, : model.ahn_config.lossless] = False
    student = decoder(ids_BT, use_cache=False).last_hidden_state[counts]
    if kind == "ce":
        following = F.pad(ids_BT[:, 1:], (0, 1))[counts]
        return _LinearCrossEntropy.apply(student, head, following)
    with torch.no_grad(), full_attention(model):
        teacher = decoder(ids_BT, use_cache=False).last_hidden_state[counts]
    return _LinearDivergence.apply(student, head, teacher)


@torch.compile(dynamic=True, disable=not torch.cuda.is_available())
def _divergence(student: Tensor, teacher: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of KL(teacher || student) over [C] tokens and its gradient by the student's hidden states [C, D]."""
    student_log = F.log_softmax((student @ head.T).float(), -1)
    teacher_log = F.log_softmax((teacher @ head.T).float(), -1)
    likely = teacher_log.exp()
    value = (likely * (teacher_log - student_log)).sum()
    return value, (student_log.exp() - likely).to(head.dtype) @ head


@torch.compile(dynamic=True, disable=not torch.cuda.is_available())
def _cross_entropy(student: Tensor, following: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    log = F.log_softmax((student @ head.T).float(), -1)
    value = -log.gather(1, following[:, None]).sum()
    return value, log.exp().to(head.dtype) @ head - head[following]


class _Chunked(torch.autograd.Function):
    """Mean over tokens of a loss on `hidden @ head.T`, chunk by chunk: the gradient by `hidden` is made on the way
    forward, the logits are gone at once. The head is frozen."""

    chunk: Any

    @classmethod
    def run(cls, ctx: Any, hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden)
        for part, wanted, out in zip(*(t.split(TOKENS_AT_ONCE) for t in (hidden, target, gradient)), strict=True):
            value, by_hidden = cls.chunk(part, wanted, head)
            total += value
            out.copy_(by_hidden)
        count = max(len(hidden), 1)
        ctx.save_for_backward(gradient.div_(count))
        return total / count

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None


class _LinearDivergence(_Chunked):
    chunk = staticmethod(_divergence)

    @staticmethod
    def forward(ctx: Any, student: Tensor, head: Tensor, teacher: Tensor) -> Tensor:
        return _LinearDivergence.run(ctx, student, head, teacher)


class _LinearCrossEntropy(_Chunked):
    chunk = staticmethod(_cross_entropy)

    @staticmethod
    def forward(ctx: Any, student: Tensor, head: Tensor, following: Tensor) -> Tensor:
        return _LinearCrossEntropy.run(ctx, student, head, following)
