"""The loss of self-distillation, and the two forwards that it compares.

Letters: B batch, T tokens, D hidden size, V vocabulary, C tokens at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ahn.hf.hooks import full_attention
from ahn.memory.batch import LayerBatch

CROSS_ENTROPY = {"kl": 0.0, "ce": 1.0, "kl+ce": 0.5}  # share of the cross-entropy in each loss

TOKENS_AT_ONCE = 2048  # only the logits of so many tokens exist at a time


def loss(model: Any, ids_BT: Tensor, counts_BT: Tensor, kind: str = "kl") -> Tensor:
    """Mean loss over the tokens that count and come after the lossless ones.

    Args:
        model: an augmented model; its present window and sinks are used.
        ids_BT: whole sequences, without padding in front.
        counts_BT: bool, whether the token that FOLLOWS is to be predicted. False in a prompt and in padding.
        kind: "kl", KL(teacher || student) of the next token (paper); "ce", cross-entropy with the text itself;
            "kl+ce", the mean of the two; "attention", see `transfer`.
    """
    counts = counts_BT.clone()
    counts[:, : model.ahn_config.lossless] = False
    if kind == "attention":
        return transfer(model, ids_BT, counts)
    share = CROSS_ENTROPY[kind]
    decoder, head = model.get_decoder(), model.get_output_embeddings().weight
    student = decoder(ids_BT, use_cache=False).last_hidden_state[counts]
    teacher = None
    if share < 1:
        with torch.no_grad(), full_attention(model):
            teacher = decoder(ids_BT, use_cache=False).last_hidden_state[counts]
    return head_loss(student, teacher, ids_BT, counts, head, share)


def head_loss(
    student_CD: Tensor,
    teacher_CD: Tensor | None,
    ids_BT: Tensor,
    counts_BT: Tensor,
    head_VD: Tensor,
    share: float = 0.0,
) -> Tensor:
    """Mean of (1 - share) KL(teacher || student) + share CE of the next token, over the tokens that count.

    Args:
        student_CD, teacher_CD: last hidden states of the C tokens that count. Without a teacher the share must be 1.
        head_VD: weight of the output embeddings.
    """
    following = F.pad(ids_BT[:, 1:], (0, 1))[counts_BT]
    return _HeadLoss.apply(student_CD, teacher_CD, following, head_VD, share)


def transfer(model: Any, ids_BT: Tensor, counts_BT: Tensor) -> Tensor:
    """Attention transfer (Hedgehog, arXiv 2402.04347): how far each layer with a memory is from full attention, given
    the teacher's own input to that layer.

    The error of a layer is the squared difference of both outputs of o_proj over the square of the teacher's. The loss
    is the mean over layers. Every layer learns by itself, so the base runs forward once and never backward.

    Args:
        ids_BT, counts_BT: as of `loss`, which has excluded the lossless tokens.
    """
    weights = counts_BT.float()
    errors: list[Tensor] = []

    def observe(attention: Any, tokens: LayerBatch, full: Tensor) -> None:
        if attention.ahn.cell is None:
            return
        wanted = attention.o_proj(full.flatten(2)).float()
        with torch.enable_grad():
            given = attention.o_proj(attention.ahn(tokens, None).flatten(2)).float()
            missed, whole = ((y.square().sum(-1) * weights).sum() for y in (given - wanted, wanted))
            errors.append(missed / whole.clamp(min=1e-9))

    with torch.no_grad(), torch.autocast(ids_BT.device.type, enabled=False), full_attention(model, observe):
        model.get_decoder()(ids_BT, use_cache=False)
    return torch.stack(errors).mean()


class _HeadLoss(torch.autograd.Function):
    """Mean loss of `student @ head.T`, chunk by chunk. The forward pass computes the gradient by `student` too, so the
    logits of a chunk need not be kept. The head is frozen."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor | None, following: Tensor, head: Tensor, share: float
    ) -> Tensor:
        total = torch.zeros((), device=student.device)
        gradient = torch.empty_like(student)
        for low in range(0, len(student), TOKENS_AT_ONCE):
            part = slice(low, low + TOKENS_AT_ONCE)
            value, gradient[part] = _chunk(
                student[part], None if teacher is None else teacher[part], following[part], head, share
            )
            total += value
        count = max(len(student), 1)
        ctx.save_for_backward(gradient.div_(count))
        return total / count

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None, None, None


@torch.compile(dynamic=True, disable=not torch.cuda.is_available())
def _chunk(
    student_CD: Tensor, teacher_CD: Tensor | None, following_C: Tensor, head_VD: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """Sum of (1 - share) KL(teacher || student) + share CE over the tokens, and its gradient by the student, [C, D].

    The gradient by the logits is the student's probabilities minus the targets: the teacher's probabilities and the
    one-hot labels, mixed by the same share.
    """
    log = F.log_softmax((student_CD @ head_VD.T).float(), -1)
    right = -log.gather(1, following_C[:, None]).sum()
    if teacher_CD is None:
        return right, log.exp().to(head_VD.dtype) @ head_VD - head_VD[following_C]
    wanted_log = F.log_softmax((teacher_CD @ head_VD.T).float(), -1)
    wanted = wanted_log.exp()
    value = (1 - share) * (wanted * (wanted_log - log)).sum() + share * right
    by_hidden = (log.exp() - (1 - share) * wanted).to(head_VD.dtype) @ head_VD - share * head_VD[following_C]
    return value, by_hidden
