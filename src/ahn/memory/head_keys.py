"""Keys of retrieval heads, kept for the whole text: by them a model finds a passage that answers a question.

Letters: T tokens, M key/value heads, C the kept ones of a layer, H head size, G groups of tokens.

A few heads of a few layers look for the answer of a question (QRHead, arXiv 2506.09944). Their keys are taken out of
their rotary positions, averaged over `pool` neighbouring tokens, and kept as int8 on the host: H / pool bytes a token
for each key/value head. Without positions a key is the same wherever it stands, so a text may be longer than the
model's context.

Each channel has a fixed step of its int8 values and a centre. Subtracting the centre from every key moves all scores of
a query by the same number, which no softmax sees, and leaves the int8 values for the differences between keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ahn.errors import ConfigError
from ahn.memory.calibration import Calibration

Observer = Callable[[Any, Tensor, Tensor, Any], None]
UNKNOWN = -128  # first channel of a key that is not known; others are within 127


@dataclass(frozen=True, eq=False)
class RetrievalHeads:
    """Which heads find passages, and how their keys are kept.

    Args:
        heads: query heads as (layer, head). groups: query heads that share a key/value head.
        scales: by layer, float32 [2, C, H]: the centre of each channel of the kept keys, and the step of its int8
            values.
        pool: tokens whose keys are averaged. distance: positions at which a question is held against every key.
        calibration: when an answer is supported, as measured with these heads; None: not known.

    Raises:
        ConfigError: no heads, negative numbers, or scales that do not fit the heads.
    """

    heads: tuple[tuple[int, int], ...]
    groups: int
    scales: dict[int, Tensor] = field(repr=False)
    pool: int = 1
    distance: int = 512
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        numbers = [self.groups, self.pool, self.distance + 1, *(n + 1 for head in self.heads for n in head)]
        if not self.heads or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
            raise ConfigError(f"{self}: expected heads as pairs (layer, head), groups and pool of at least 1")
        for layer in self.layers:
            found = self.scales.get(layer)
            wanted = [2, len(self.kept(layer))]
            if found is None or found.dim() != 3 or list(found.shape[:2]) != wanted:
                shape = "none" if found is None else list(found.shape)
                raise ConfigError(f"scales of layer {layer}, {shape}: expected [2, {wanted[1]}, head size]")
            if not (found.isfinite().all() and (found[1] > 0).all()):
                raise ConfigError(f"scales of layer {layer}: expected finite numbers and steps above 0")

    @property
    def layers(self) -> list[int]:
        return sorted({layer for layer, _ in self.heads})

    def queries(self, layer: int) -> list[int]:
        """Query heads of a layer."""
        return sorted(head for at, head in self.heads if at == layer)

    def kept(self, layer: int) -> list[int]:
        """Key/value heads of a layer."""
        return sorted({head // self.groups for head in self.queries(layer)})

    @property
    def bytes_per_token(self) -> float:
        return sum(self.scales[layer][0].numel() for layer in self.layers) / self.pool

    @cached_property
    def digest(self) -> str:
        """Identifies heads and scales."""
        found = hashlib.sha256(str((sorted(self.heads), self.groups, self.pool, self.distance)).encode())
        for layer in self.layers:
            found.update(self.scales[layer].float().contiguous().numpy().tobytes())
        return found.hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """All but the scales."""
        found = {
            "heads": [list(head) for head in self.heads],
            "groups": self.groups,
            "pool": self.pool,
            "distance": self.distance,
            "digest": self.digest,
        }
        return found if self.calibration is None else found | {"calibration": self.calibration.to_dict()}

    @classmethod
    def from_dict(cls, values: Any, scales: dict[int, Tensor]) -> RetrievalHeads:
        """Inverse of `to_dict`. Raises ConfigError."""
        try:
            heads = tuple((layer, head) for layer, head in values["heads"])
            calibration = values.get("calibration")
            calibration = None if calibration is None else Calibration.from_dict(calibration)
            found = cls(heads, values["groups"], scales, values["pool"], values["distance"], calibration)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"retrieval heads {values!r}: expected heads, groups, pool and distance") from error
        if values.get("digest") != found.digest:
            raise ConfigError("retrieval heads: their scales are damaged, or of other heads")
        return found


class HeadKeys:
    """Keys of the heads that `heads` names, of one text, in the order of reading.

    Tokens that were not seen by `observer`, such as those decoded by a CUDA graph, have none.
    """

    def __init__(self, heads: RetrievalHeads) -> None:
        self.heads = heads
        self._layers = {layer: _LayerKeys(heads.scales[layer], heads.pool) for layer in heads.layers}

    def copy(self) -> HeadKeys:
        twin = HeadKeys(self.heads)
        twin._layers = {layer: keys.copy() for layer, keys in self._layers.items()}
        return twin

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes for keys in self._layers.values())

    def observer(self, layer: int) -> Observer | None:
        return partial(self._observe, layer) if layer in self._layers else None

    def _observe(self, index: int, layer: Any, q: Tensor, k: Tensor, batch: Any) -> None:
        count = batch.counts[0]
        k = batch.compact(k, 2)[:, self.heads.kept(index), :count]
        positions = batch.positions(k.device)[:, :count]
        self._layers[index].add(layer.without_positions(k, positions)[0], batch.first)

    def of(self, layer: int) -> Tensor:
        """int8 [G, C, H], in steps of the layer's scales; where a key is not known its first channel is UNKNOWN."""
        return self._layers[layer].joined()

    def tensors(self, first: int, length: int) -> dict[str, Tensor]:
        """Keys of the groups from that of token `first` on, and those of the last group of the `length` tokens if it is
        not complete."""
        found, low = {}, first // self.heads.pool
        for layer in self.heads.layers:
            found[f"keys.{layer}"] = self.of(layer)[low:]
            if (tail := self._layers[layer].tail_of(length)) is not None and tail.shape[1]:
                found[f"tail.{layer}"] = tail.cpu()
        return found

    def restore(self, parts: list[dict[str, Tensor]], firsts: list[int], length: int) -> None:
        """Inverse of `tensors` for a text of `length` tokens, of parts that follow each other and begin at the tokens
        `firsts`. Raises ValueError."""
        for layer, held in self._layers.items():
            name, shape = f"keys.{layer}", self.heads.scales[layer].shape[1:]
            keys = [part[name] for part in parts if name in part]
            if len(keys) < len(parts) or any(k.dtype != torch.int8 or k.shape[1:] != shape for k in keys):
                raise ValueError(f"keys of layer {layer} that do not fit its heads")
            tail = parts[-1].get(f"tail.{layer}") if parts else None
            if tail is not None and (tail.dim() != 3 or tail.shape[::2] != shape or not tail.is_floating_point()):
                raise ValueError(f"keys of layer {layer} that do not fit its heads")
            held.restore([first // self.heads.pool for first in firsts], keys, tail, length)


class _LayerKeys:
    """Groups of one layer: pieces that follow each other, and the keys of a group that is not complete."""

    def __init__(self, scales: Tensor, pool: int) -> None:
        self.scales, self.pool = scales, pool
        self.tail: Tensor | None = None  # [C, fewer than pool, H]
        self._pieces: list[tuple[int, Tensor]] = []  # first group, int8 [G, C, H]
        self._next = 0  # position after the tail

    def copy(self) -> _LayerKeys:
        twin = _LayerKeys(self.scales, self.pool)
        twin._pieces, twin.tail, twin._next = list(self._pieces), self.tail, self._next
        return twin

    @property
    def nbytes(self) -> int:
        return sum(keys.nbytes for _, keys in self._pieces)

    def add(self, k: Tensor, first: int) -> None:
        """Keys [C, T, H] of tokens from position `first` on."""
        if first != self._next or self.tail is None:
            skipped = -first % self.pool  # tokens of a group whose first ones are not known
            k, first = k[:, skipped:], first + skipped
        else:
            first -= self.tail.shape[1]
            k = torch.cat([self.tail.to(k), k], 1)
        whole = k.shape[1] // self.pool
        self._next = first + k.shape[1]
        self.tail = k[:, whole * self.pool :].clone()
        if whole:
            pooled = k[:, : whole * self.pool].unflatten(1, (whole, self.pool)).float().mean(2).transpose(0, 1)
            centre, step = self.scales.to(k.device, non_blocking=True)  # not kept there: the device holds no archive
            keys = ((pooled - centre) / step).round().clamp(-127, 127).to(torch.int8)
            self._pieces.append((first // self.pool, to_host(keys)))

    def tail_of(self, length: int) -> Tensor | None:
        """The tail if it is that of `length` tokens, which it is not where the last ones were not seen."""
        return self.tail if self._next == length else None

    def joined(self) -> Tensor:
        wait_for([keys for _, keys in self._pieces])
        if len(self._pieces) != 1 or self._pieces[0][0]:
            self._join()
        return self._pieces[0][1]

    def _join(self) -> None:
        total = max((low + len(keys) for low, keys in self._pieces), default=0)
        whole = torch.full((total, *self.scales.shape[1:]), UNKNOWN, dtype=torch.int8)
        for low, keys in self._pieces:
            whole[low : low + len(keys)] = keys
        self._pieces = [(0, whole)]

    def restore(self, groups: list[int], keys: list[Tensor], tail: Tensor | None, length: int) -> None:
        """`keys`: pieces, which begin at `groups`. Raises ValueError if they overlap."""
        ends = [low + len(piece) for low, piece in zip(groups, keys, strict=True)]
        if any(end > after for end, after in zip(ends, [*groups[1:], length // self.pool], strict=True)):
            raise ValueError("keys of more tokens than there are")
        self._pieces, self._next = list(zip(groups, keys, strict=True)), length
        channels, size = self.scales.shape[1:]
        tail = torch.zeros(channels, 0, size) if tail is None else tail
        self.tail = tail if tail.shape[1] == length % self.pool else None


def to_host(x: Tensor) -> Tensor:
    """A copy on the host. A GPU makes it when it comes to it: call `wait_for` before it is read."""
    if x.device.type != "cuda":
        return x.cpu().clone()
    held = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return held.copy_(x, non_blocking=True)


def wait_for(copies: Sequence[Tensor]) -> None:
    """Until copies of `to_host` are complete."""
    if any(copy.is_pinned() for copy in copies):
        torch.cuda.synchronize()
