"""Checks token ids and masks in the forms that users have them in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ahn.errors import ConfigError


def rows_of(ids: Any, vocabulary: int) -> tuple[Tensor, Tensor | None]:
    """Token ids as int64 [B, T], and the attention mask that comes with them, or None.

    Args:
        ids: at least one integer, [T] or [B, T], as a tensor, an array or lists; or the mapping that a tokenizer
            returns, with `input_ids`.
        vocabulary: number of tokens in the vocabulary.

    Raises:
        ConfigError: text, rows of different lengths, no tokens, no integers, an id that does not exist, or a tensor on
            meta, sparse, nested or quantised.
    """
    mask = None
    if isinstance(ids, Mapping):
        if "input_ids" not in ids:
            raise ConfigError(f"ids with the keys {', '.join(map(repr, ids))}: expected 'input_ids'")
        ids, mask = ids["input_ids"], ids.get("attention_mask")
    if isinstance(ids, str | bytes):
        raise ConfigError(f"ids={ids[:40]!r}: expected token ids, as tokenizer(text).input_ids has them")
    try:
        found = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"ids of type {type(ids).__name__}: expected integers, in rows of one length ({error})"
        ) from None
    _check_plain(found, "ids")
    found = found[None] if found.dim() == 1 else found
    if found.dim() != 2 or found.numel() == 0:
        raise ConfigError(
            f"ids of shape {list(found.shape)}: expected at least one token id, [tokens] or [batch, tokens]"
        )
    return checked(found, vocabulary), None if mask is None else mask_of(mask)


def checked(ids: Tensor, vocabulary: int) -> Tensor:
    """Token ids as int64. Raises ConfigError if they are no integers, or not in the vocabulary."""
    _check_plain(ids, "ids")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ConfigError(f"ids of {ids.dtype}: expected at least one token id, an integer")
    ids = ids.long()
    low, high = torch.stack(torch.aminmax(ids)).tolist()
    if low < 0 or high >= vocabulary:
        raise ConfigError(f"token id {high if high >= vocabulary else low}: expected 0 to {vocabulary - 1}")
    return ids


def mask_of(mask: Any) -> Tensor:
    """An attention mask as int64 [B, T], 0 for padding. Raises ConfigError."""
    try:
        found = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"attention_mask of type {type(mask).__name__}: expected zeros and ones ({error})") from None
    _check_plain(found, "attention_mask")
    found = found[None] if found.dim() == 1 else found
    if found.dim() != 2:
        raise ConfigError(f"attention_mask of shape {list(found.shape)}: expected [batch, tokens]")
    return (found != 0).long()


def _check_plain(tensor: Tensor, name: str) -> None:
    """Raises ConfigError unless `tensor` is an ordinary dense one that holds its numbers."""
    form = (
        "on the meta device" if tensor.is_meta
        else "nested" if tensor.is_nested
        else "quantised" if tensor.is_quantized
        else "sparse" if tensor.layout != torch.strided
        else ""
    )  # fmt: skip
    if form:
        raise ConfigError(f"{name} as a tensor that is {form}: expected a dense tensor of integers")
