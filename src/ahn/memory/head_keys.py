"""Keys of retrieval heads: those by which a model finds a passage that answers a question, kept for the whole text.

Letters: T tokens, M key/value heads, C the kept ones of a layer, H head size, G groups of tokens.

A few heads of a few layers look for the answer of a question (QRHead, arXiv 2506.09944). Their keys are taken out of
their rotary positions, averaged over `pool` neighbouring tokens, and kept as int8 on the host: H / pool bytes a token
for each key/value head. Without positions a key is the same wherever it stands, so a text may be longer than the
model's context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ahn.errors import ConfigError

Observer = Callable[[Any, Tensor, Tensor, Any], None]


@dataclass(frozen=True)
class RetrievalHeads:
    """Which heads find passages, and how their keys are kept.

    Args:
        heads: query heads as (layer, head). groups: query heads that share a key/value head.
        pool: tokens whose keys are averaged. distance: positions at which a question is held against every key.

    Raises:
        ConfigError: no heads, or negative numbers.
    """

    heads: tuple[tuple[int, int], ...]
    groups: int
    pool: int = 4
    distance: int = 512

    def __post_init__(self) -> None:
        numbers = [self.groups, self.pool, self.distance + 1, *(n + 1 for head in self.heads for n in head)]
        if not self.heads or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
            raise ConfigError(f"{self}: expected heads as pairs (layer, head), groups and pool of at least 1")

    @property
    def layers(self) -> list[int]:
        return sorted({layer for layer, _ in self.heads})

    def queries(self, layer: int) -> list[int]:
        """Query heads of a layer."""
        return sorted(head for at, head in self.heads if at == layer)

    def kept(self, layer: int) -> list[int]:
        """Key/value heads of a layer."""
        return sorted({head // self.groups for head in self.queries(layer)})

    def bytes_per_token(self, size: int) -> float:
        """Of keys of `size` numbers: int8, and a float16 scale a group."""
        return sum(len(self.kept(layer)) for layer in self.layers) * (size + 2) / self.pool

    def to_dict(self) -> dict[str, Any]:
        return {
            "heads": [list(head) for head in self.heads],
            "groups": self.groups,
            "pool": self.pool,
            "distance": self.distance,
        }

    @classmethod
    def from_dict(cls, values: Any) -> RetrievalHeads:
        """Inverse of `to_dict`. Raises ConfigError."""
        try:
            heads = tuple((layer, head) for layer, head in values["heads"])
            return cls(heads, values["groups"], values["pool"], values["distance"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"retrieval heads {values!r}: expected heads, groups, pool and distance") from error


class HeadKeys:
    """Keys of the heads that `heads` names, of one text, in the order of reading.

    Tokens that were not seen by `observer`, such as those decoded by a CUDA graph, have none.
    """

    def __init__(self, heads: RetrievalHeads) -> None:
        self.heads = heads
        self._layers = {layer: _LayerKeys() for layer in heads.layers}

    def copy(self) -> HeadKeys:
        twin = HeadKeys(self.heads)
        twin._layers = {layer: keys.copy() for layer, keys in self._layers.items()}
        return twin

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes for keys in self._layers.values())

    def observer(self, layer: int) -> Observer | None:
        return partial(self._observe, layer) if layer in self._layers else None

    def _observe(self, index: int, layer: Any, q: Tensor, k: Tensor, span: Any) -> None:
        count = span.counts[0]
        k = span.compact(k, 2)[:, self.heads.kept(index), :count]
        positions = span.positions(k.device)[:, :count]
        self._layers[index].add(layer.without_positions(k, positions)[0], span.first, self.heads.pool)

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """int8 [G, C, H], and scales float16 [G, C], 0 where a key is not known."""
        return self._layers[layer].joined()

    def tensors(self, first: int = 0) -> dict[str, Tensor]:
        found, low = {}, first // self.heads.pool
        for layer in self.heads.layers:
            keys, scales = self.of(layer)
            found |= {f"keys.{layer}": keys[low:], f"scales.{layer}": scales[low:]}
            if (tail := self._layers[layer].tail) is not None:
                found[f"tail.{layer}"] = tail.cpu()
        return found

    def restore(self, tensors: dict[str, Tensor], length: int) -> None:
        """Inverse of `tensors` for a text of `length` tokens."""
        for layer, held in self._layers.items():
            held.restore(tensors[f"keys.{layer}"], tensors[f"scales.{layer}"], tensors.get(f"tail.{layer}"), length)


class _LayerKeys:
    """Groups of one layer: pieces that follow each other, and the keys of a group that is not complete."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, Tensor, Tensor]] = []  # first group, int8 [G, C, H], float16 [G, C]
        self.tail: Tensor | None = None  # [C, fewer than pool, H]
        self._next = 0  # position after the tail

    def copy(self) -> _LayerKeys:
        twin = _LayerKeys()
        twin._pieces, twin.tail, twin._next = list(self._pieces), self.tail, self._next
        return twin

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes + scales.nbytes for _, keys, scales in self._pieces)

    def add(self, k: Tensor, first: int, pool: int) -> None:
        """Keys [C, T, H] of tokens from position `first` on."""
        if first != self._next or self.tail is None:
            skipped = -first % pool  # tokens of a group whose first ones are not known
            k, first = k[:, skipped:], first + skipped
        else:
            first -= self.tail.shape[1]
            k = torch.cat([self.tail, k], 1)
        whole = k.shape[1] // pool
        self._next = first + k.shape[1]
        self.tail = k[:, whole * pool :].clone()
        if whole:
            keys, scales = quantised(k[:, : whole * pool].unflatten(1, (whole, pool)).float().mean(2).transpose(0, 1))
            self._pieces.append((first // pool, _to_host(keys), _to_host(scales)))

    def joined(self) -> tuple[Tensor, Tensor]:
        if len(self._pieces) != 1 or self._pieces[0][0]:
            self._join()
        _, keys, scales = self._pieces[0]
        return keys, scales

    def _join(self) -> None:
        if any(keys.is_pinned() for _, keys, _ in self._pieces):
            torch.cuda.synchronize()
        total = max((low + len(keys) for low, keys, _ in self._pieces), default=0)
        shape = self._pieces[0][1].shape[1:] if self._pieces else (0, 0)
        whole, sizes = torch.zeros(total, *shape, dtype=torch.int8), torch.zeros(total, shape[0], dtype=torch.float16)
        for low, keys, scales in self._pieces:
            whole[low : low + len(keys)], sizes[low : low + len(keys)] = keys, scales
        self._pieces = [(0, whole, sizes)]

    def restore(self, keys: Tensor, scales: Tensor, tail: Tensor | None, length: int) -> None:
        self._pieces, self.tail, self._next = [(0, keys, scales)], tail, length


def quantised(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [..., H] as int8 [..., H] and a float16 scale [...], which is never 0."""
    scales = (keys.abs().amax(-1) / 127).clamp(min=1e-4).half()
    return (keys / scales.float()[..., None]).round().clamp(-127, 127).to(torch.int8), scales


def _to_host(x: Tensor) -> Tensor:
    """A copy that the device makes when it comes to it."""
    if x.device.type != "cuda":
        return x.cpu()
    held = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return held.copy_(x, non_blocking=True)


def all_heads(layers: Sequence[int], heads: int, groups: int, pool: int, distance: int) -> RetrievalHeads:
    """Every head of these layers: what heads are chosen from."""
    return RetrievalHeads(tuple((layer, head) for layer in layers for head in range(heads)), groups, pool, distance)
