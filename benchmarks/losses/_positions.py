"""The loss at each position, and the loss over the second half of books."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

import ahn
from ahn.compat import PAST

ROWS = 4  # books at once


@torch.inference_mode()
def position_losses(model: Any, ids: Tensor, chunk: int = 512, whole: bool = False) -> Tensor:
    """Next-token loss (nats) at each position of ids [B, T + 1], as [B, T] on the CPU.

    Reads through a cache in chunks, or all positions in one forward if `whole`.
    """
    decoder, head, ids = model.get_decoder(), model.get_output_embeddings(), ids.to(model.device)
    if whole:
        pieces = decoder(ids[:, :-1], use_cache=False).last_hidden_state.split(chunk, 1)
    else:
        cache = ahn.AHNCache(model) if hasattr(model, "ahn_config") else DynamicCache()
        options = {PAST: cache, "use_cache": True}
        pieces = (decoder(piece, **options).last_hidden_state for piece in ids[:, :-1].split(chunk, 1))
    found = []
    for hidden, following in zip(pieces, ids[:, 1:].split(chunk, 1), strict=True):
        logits = head(hidden).float().flatten(0, 1)
        found.append(cross_entropy(logits, following.flatten(), reduction="none").view_as(following))
    return torch.cat(found, 1).cpu()


def mean_loss(model: Any, books: Tensor) -> float:
    """The loss over the second half of whole sequences [books, T + 1]."""
    half = (books.shape[1] - 1) // 2
    parts = books.tensor_split(-(-len(books) // ROWS))  # near-equal parts: none is a single row
    return torch.cat([position_losses(model, part, whole=True)[:, half:] for part in parts]).mean().item()
