"""AHNCache: everything that is remembered of a sequence, of constant size once the window is full.

Letters: B batch, T tokens, N query heads, M key/value heads, H head size, S sinks, W window, G gate inputs;
R rows of positions: 1 where all of the batch are at the same position, else B.

A layer keeps one buffer of S + W slots: the sinks in the first S, the window as a ring in the rest. Token t lies in
slot t while t < S, else in S + (t - S) mod W, so a new token takes the slot of the one it pushes out, and a buffer that
is not full yet is simply shorter.
"""

from __future__ import annotations

import copy
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import create_causal_mask

from ahn import weights
from ahn.errors import AHNError, ConfigError, UnsupportedOperationError
from ahn.interrupts import deferred
from ahn.memory.archive import Archive, new_archive
from ahn.transcript import Transcript

TEXT = "text"  # name of the ids in a memory file
# what a cache is called among the arguments and results of a model: transformers 5.24 renamed it
PAST, OTHER_PAST = "cache", "past_key_values"
if PAST not in inspect.signature(create_causal_mask).parameters:
    PAST, OTHER_PAST = OTHER_PAST, PAST

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ahn.layer import AHNLayer

T = TypeVar("T")
_IN_USE = "this cache is in use by another call: expected one call at a time; fork it for another"
_OTHER_WEIGHTS = (
    "the weights of the model have changed since the cache was made: expected a new cache, which reads the text again"
)
_NO_MODEL = (
    "the model has no memories, or others than those that the cache was made for: expected a cache made by "
    "ahn.AHNCache(model) for the model as it is now"
)


@dataclass
class Span:
    """The tokens of one forward call, and where they are in their sequences.

    Padding does not exist for the memory: `compact` moves the real tokens of each row to the front, where row b holds
    positions start[b], start[b] + 1, ...; what is behind them is computed and thrown away.
    """

    start: Tensor  # [R] int64, on the CPU: positions of the first token
    length: int  # T
    counts: list[int]  # real tokens, by row: R of them
    order: Tensor | None = None  # [B, T]: which token comes i-th, real ones first; None: nothing is padded
    back: Tensor | None = None  # [B, T]: its inverse
    written: bool = False  # whether a layer has begun to store it
    made: dict[Any, Any] = field(default_factory=dict)  # what `once` keeps
    on_device = False  # whether only the device knows the positions, see `ahn.decoding.Step`
    due = False  # of such a step: whether it does what few positions ask for

    @classmethod
    def of(cls, start: list[int], length: int, real: Tensor | None) -> Span:
        """`start`: tokens seen before, by row. `real`: bool [B, T] on the CPU, false for padding, or None."""
        if real is None or bool(real.all()):
            same = len(set(start)) == 1
            start = start[:1] if same else start
            return cls(torch.tensor(start), length, [length] * len(start))
        start = start * real.shape[0] if len(start) == 1 else start
        order = (~real).int().argsort(dim=1, stable=True)
        return cls(torch.tensor(start), length, real.sum(1).tolist(), order, order.argsort(dim=1))

    @property
    def padded(self) -> bool:
        return self.order is not None

    @property
    def first(self) -> int:
        """The furthest position any row starts at."""
        return int(self.start.max())

    # What depends on each token is computed on the device that asks: a host takes milliseconds for a long span.
    def start_on(self, device: torch.device) -> Tensor:
        return self.once(("start", device), lambda: self.start.to(device))

    def positions(self, device: torch.device) -> Tensor:
        """[R, T] after compaction."""

        def make() -> Tensor:
            return self.start_on(device)[:, None] + torch.arange(self.length, device=device)

        return self.once(("positions", device), make)

    def real(self, device: torch.device) -> Tensor:
        """bool [R, T] after compaction."""
        counts = torch.tensor(self.counts, device=device)
        return torch.arange(self.length, device=device) < counts[:, None]

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What is the same for all layers, made for the first that asks: positions, angles, indices."""
        if key not in self.made:
            self.made[key] = make()
        found: T = self.made[key]
        return found

    def on_grid(self, grid: int) -> list[tuple[slice, Span]]:
        """After compaction, the tokens between multiples of `grid` of any row's positions; all at once if it is 0.
        The same for all layers."""
        return self.once(("grid", grid), lambda: self._on_grid(grid)) if grid else [(slice(None), self)]

    def _on_grid(self, grid: int) -> list[tuple[slice, Span]]:
        starts, parts = self.start.tolist(), []
        ends = sorted({end for at in starts for end in range(grid - at % grid, self.length, grid)} | {self.length})
        for low, high in zip([0, *ends], ends, strict=False):
            counts = [min(max(count - low, 0), high - low) for count in self.counts]
            start = [at + min(count, low) for at, count in zip(starts, self.counts, strict=True)]
            parts.append((slice(low, high), Span(torch.tensor(start), high - low, counts)))
        return parts

    def compact(self, x: Tensor, dim: int) -> Tensor:
        return x if self.order is None else gather(x, self.order, dim)

    def restore(self, x: Tensor, dim: int) -> Tensor:
        return x if self.back is None else gather(x, self.back, dim)

    @property
    def ends(self) -> Tensor:
        """Positions [R] of what comes after it."""
        return self.start + torch.tensor(self.counts)

    def after(self) -> list[int]:
        return self.ends.tolist()

    def aside(self, x: Tensor) -> AbstractContextManager[Any]:
        """Within is computed, from `x`, what nothing else that is done to the span waits for."""
        return nullcontext()


class LayerMemory(CacheLayerMixin):
    """What one layer remembers: sinks and window in `keys`, `values` [B, M, S + W, H] and `inputs` [B, S + W, G * N],
    and the compressed rest in `state` [B, N, K, H] (`ahn.cells.base`). `window` None keeps everything."""

    is_sliding = False
    is_croppable = False
    is_compileable = False
    shift = 0  # slots between the sinks and the ring
    observer: Callable[[AHNLayer, Tensor, Tensor, Span], None] | None = None
    """Called with the layer, queries [B, N, T, H], keys [B, M, T, H] and span of new tokens, before they are read.
    Steps of a graph are not observed."""

    def __init__(self, layer: AHNLayer) -> None:
        super().__init__()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.window, self.sinks = layer.window, layer.sinks
        self.gate_width = layer.gate_width
        self.inputs: Tensor | None = None
        self.state: Tensor | None = None

    def __repr__(self) -> str:
        return f"LayerMemory(window={self.window}, sinks={self.sinks}, nbytes={self.nbytes})"

    @property
    def tensors(self) -> dict[str, Tensor]:
        held = {"keys": self.keys, "values": self.values, "inputs": self.inputs, "state": self.state}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    @property
    def kept(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all slots."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    @property
    def compressed(self) -> Tensor:
        assert self.state is not None
        return self.state

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def stored(self) -> Tensor | None:
        """The positions that a store keeps, [B, places of all heads], -1 where it keeps none."""
        return None

    @property
    def capacity(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def reserve(self, tokens: int, k: Tensor, state: tuple[int, int, int] | None) -> None:
        """Room for `tokens` tokens, at most the S + W that are ever kept; doubling, so that growing stays cheap."""
        tokens = max(tokens, 1)  # a first piece may be all padding
        if self.window is not None:
            tokens = min(tokens, self.sinks + self.window)
        if tokens <= self.capacity:
            return
        room = max(tokens, 2 * self.capacity)
        room = room if self.window is None else min(room, self.sinks + self.window)
        batch, kv_heads, _, size = k.shape
        self.keys = _grown(self.keys, (batch, kv_heads, room, size), 2, k)
        self.values = _grown(self.values, (batch, kv_heads, room, size), 2, k)
        if state is not None:
            self.inputs = _grown(self.inputs, (batch, room, self.gate_width), 1, k)
            if self.state is None:
                self.state = torch.zeros(batch, *state, device=k.device)
        self.is_initialized = True

    def slots(self, positions: Tensor) -> Tensor:
        """Where the tokens at `positions` lie."""
        if self.window is None:
            return positions
        ring = self.sinks + self.shift + (positions - self.sinks) % self.window
        return torch.where(positions < self.sinks, positions, ring)

    def window_before(self, span: Span) -> tuple[Tensor, ...]:
        """Copies of the window's keys, values and gate inputs before `span`, oldest first, ending at each row's last
        token; rows that have fewer hold rubbish in front, at positions that are below S or negative."""
        slots = span.once(("before", self._form), lambda: self._slots_before(span))
        tensors = [(self.keys, 2), (self.values, 2), (self.inputs, 1)]
        return tuple(gather(t, slots, dim) for t, dim in tensors if t is not None)

    def put(self, span: Span, k: Tensor, v: Tensor, inputs: Tensor | None) -> None:
        """Write the tokens of a compacted span into their slots: those that are still kept at its end."""
        row, token, slots = span.once(("put", self._form), lambda: self._slots_of(span))
        for buffer, new, dim in ((self.keys, k, 2), (self.values, v, 2), (self.inputs, inputs, 1)):
            if buffer is None or new is None:
                continue
            if len(span.counts) == 1:
                buffer.index_copy_(dim, slots, _select(new, token, dim))
            elif dim == 2:
                buffer[row, :, slots] = new[row, :, token]
            else:
                buffer[row, slots] = new[row, token]

    @property
    def _form(self) -> tuple[Any, ...]:
        """What the slots of a span depend on."""
        return self.window, self.shift, self.capacity, self.kept[0].device

    def _slots_before(self, span: Span) -> Tensor:
        length, device = max(0, span.first - self.sinks), self.kept[0].device
        length = length if self.window is None else min(length, self.window)
        positions = span.start_on(device)[:, None] + torch.arange(-length, 0, device=device)
        return self.slots(positions.clamp(min=self.sinks)).clamp(max=max(self.capacity + self.shift - 1, 0))

    def _slots_of(self, span: Span) -> tuple[Tensor, ...]:
        """Rows and tokens of a span that are still kept at its end, and where. Of one row they are known without a look
        at the device."""
        device = self.kept[0].device
        if len(span.counts) == 1:
            start, count = span.first, span.counts[0]
            sinks = min(count, max(0, self.sinks - start))
            near = sinks if self.window is None else max(sinks, count - self.window)
            token = torch.cat([torch.arange(sinks, device=device), torch.arange(near, count, device=device)])
            return torch.zeros_like(token), token, self.slots(span.start_on(device) + token)
        positions, last, kept = span.positions(device), torch.tensor(span.after(), device=device), span.real(device)
        if self.window is not None:
            kept = kept & ((positions < self.sinks) | (positions >= last[:, None] - self.window))
        row, token = kept.nonzero(as_tuple=True)
        return row, token, self.slots(positions)[row, token]

    def exchange(self, slots: Tensor, k: Tensor, v: Tensor, inputs: Tensor | None, old: bool) -> tuple[Tensor, ...]:
        """Put one token a row into `slots` [R]; returns copies of what was there before if `old`."""
        slots = slots.to(k.device)
        index = slots[:, None]
        before: list[Tensor] = []
        for buffer, new, dim in ((self.keys, k, 2), (self.values, v, 2), (self.inputs, inputs, 1)):
            if buffer is None or new is None:
                continue
            if old:
                before.append(gather(buffer, index, dim))
            if len(slots) == 1:
                buffer.index_copy_(dim, slots, new)
            else:
                buffer.scatter_(dim, _expand(index, new, dim), new)
        return tuple(before)

    def select_rows(self, rows: Tensor) -> None:
        for name, tensor in self.tensors.items():
            setattr(self, name, tensor.index_select(0, rows.to(tensor.device)))

    # What transformers asks of a cache layer; the work is done by the attention function.
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("a LayerMemory is filled by the augmented model")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise NotImplementedError("asked of the AHNCache")

    def get_seq_length(self) -> int:
        raise NotImplementedError("asked of the AHNCache")

    def get_max_length(self) -> int:
        return -1


class _Use:
    """Who uses a cache: at most one thread, for one call."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.thread: int | None = None
        self.calls = 0  # so far


class AHNCache(Cache):
    """The memory of one batch of sequences, for a model from `ahn.augment` or `ahn.from_pretrained`.

    A transformers cache: `model(ids, cache=cache)`, `model.generate(..., cache=cache)`; before transformers 5.24 the
    argument is `past_key_values`. Any number can be open on one model, each in a thread of its own: a second call on a
    cache that is in use is refused. Gradients do not flow through it. `copy.copy` and `copy.deepcopy` make forks;
    pickling is refused, `save` writes a file.

    Attributes:
        tokens_seen: tokens read so far, padding included.
        last_logits: [B, V] after `ahn.read`, else None.
        config: the AHNConfig it was made for.
        texts: what the command line notes of each text that was read, to know it again: how many `tokens`, the `sha256`
            of their ids, and whether it is `complete`.
        transcript: with a store, the ids of the tokens it keeps (`ahn.transcript`); not counted in `nbytes`.
        archive: everything that was read, on the host, or None (`ahn.memory.archive`); not counted in `nbytes`.

    Args:
        archive: "none"; "text" keeps the ids of everything that is read, so that `ahn.ask` can find passages in it and
            read them again; "keys" also the keys of the adapter's retrieval heads. For one sequence, not for a batch.

    Raises:
        ConfigError: the model is not augmented, there is no such archive, or the model has no retrieval heads.
    """

    def __init__(self, model: PreTrainedModel, archive: str = "none") -> None:
        from ahn.augmentation import frame_of, layers_of

        super().__init__(layers=[layer.memory() for layer in layers_of(model)])
        self._frame = frame_of(model)
        self._model = self._frame.model
        self._dtype = self._model.dtype
        self._adapter, self._weights = self._frame.adapter, self._frame.weights()
        self._sample: weights.Sample | None = None  # of the weights at the first reading
        self._fingerprint: str | None = None  # of the model, once it was needed
        self.config = model.ahn_config
        self.tokens_seen = 0
        self.texts: list[dict[str, Any]] = []
        self.last_logits: Tensor | None = None
        self._use = _Use()
        self._seen = [0]  # real tokens by row: one number while all rows are alike
        self._batch: int | None = None
        self._span: Span | None = None
        self._coming: tuple[int, Tensor | None] = 0, None  # rows and ids of the span
        self.transcript = Transcript() if self.config.store else None
        self.archive = new_archive(model, archive)
        self._observe()

    def __repr__(self) -> str:
        return f"AHNCache(tokens_seen={self.tokens_seen}, nbytes={self.nbytes}, {self.config})"

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers: sinks, store, window, gate inputs and states."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def batch_size(self) -> int:
        return -1 if self._batch is None else self._batch

    @property
    def tokens_per_row(self) -> list[int]:
        """Tokens read so far by row, without padding."""
        return self._seen * (self._batch or 1) if len(self._seen) == 1 else list(self._seen)

    @property
    def skips_padding(self) -> bool:
        """Whether some of the tokens read were padding, which positions do not count."""
        return self._seen != [self.tokens_seen]

    def fork(self) -> AHNCache:
        """An independent copy: reading or decoding on one leaves the other as it is.

        Raises:
            UnsupportedOperationError: another thread is using the cache.
        """
        with self._at_rest():
            twin = self.shell()
            twin._use, twin._span = _Use(), None
            twin.layers = []
            for layer in self.layers:
                layer_twin = copy.copy(layer)
                for name, tensor in layer.tensors.items():
                    setattr(layer_twin, name, tensor.clone())
                twin.layers.append(layer_twin)
            twin.transcript = None if self.transcript is None else self.transcript.copy()
            twin._seen, twin.texts = list(self._seen), list(self.texts)
            twin.archive = None if self.archive is None else self.archive.copy()
            twin._observe()
        return twin

    def shell(self) -> AHNCache:
        """Another cache with the same layers and counters, for as long as this one does not change."""
        twin: AHNCache = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __copy__(self) -> AHNCache:
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> AHNCache:
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise UnsupportedOperationError(
            "an AHNCache belongs to a model and is not pickled: expected cache.save(path) and ahn.AHNCache.load(path, "
            "model)"
        )

    def set_archive(self, archive: Archive | None) -> None:
        """Keep what is read from now on in this archive, or nowhere."""
        self.archive = archive
        self._observe()

    def _observe(self) -> None:
        """Let the archive see the keys of the layers whose keys it keeps."""
        for index, layer in enumerate(self.layers):
            layer.observer = None if self.archive is None else self.archive.observer(index)

    def save(self, path: str | Path) -> None:
        """Write everything to one file, whole or not at all (see `ahn.memory_file`).

        Raises:
            MemoryFileError: nothing was read yet, or the file cannot be written.
            ConfigError: the model's weights are no longer those that the memory was read with.
            UnsupportedOperationError: another thread is using the cache.
        """
        from ahn import memory_file

        _check_path(path)
        self.check_weights(closely=True)
        with self._at_rest():
            memory_file.save(self, path)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> AHNCache:
        """Read a file written by `save` for the same model and adapter. Raises MemoryFileError saying what differs."""
        from ahn import memory_file

        _check_path(path)
        return memory_file.load(path, model)

    def describe(self) -> dict[str, Any]:
        """What a memory file says about this cache. Raises ConfigError if the model is no longer the one that an
        earlier file was of."""
        import ahn
        from ahn.fingerprint import fingerprint

        found = fingerprint(self._model)
        if self._fingerprint not in (None, found):
            raise ConfigError(_OTHER_WEIGHTS)
        self._fingerprint = found
        return {
            "package": ahn.__version__,
            "config": self.config.to_dict(),
            "dtype": str(self._model.dtype),
            "fingerprint": found,
            "tokens_seen": self.tokens_seen,
            "seen": self._seen,
            "batch": self._batch,
            "texts": self.texts,
            **self._model.ahn_names,
        }

    def restore(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """The opposite of saving: `header` of `describe`, `tensors` by layer and name."""
        self.last_logits = tensors.pop("last_logits", None)
        for name, tensor in sorted(tensors.items(), key=lambda item: (len(item[0]), item[0])):
            index, _, kind = name.partition(".")
            if index == TEXT and self.transcript is not None:
                self.transcript.rows.append(tensor)
                continue
            setattr(self.layers[int(index)], kind, tensor)
            self.layers[int(index)].is_initialized = True
        self.tokens_seen, self._seen, self._batch = header["tokens_seen"], header["seen"], header["batch"]
        self.texts = header.get("texts", [])
        self._sample = weights.sample(self._model)

    # Who uses it, and with which weights.
    def check_model(self, frame: Any) -> None:
        """Raises ConfigError unless the cache was made for the model of `frame`, as it is now."""
        if self.config != frame.model.ahn_config:
            raise ConfigError(f"the cache was made for {self.config}, the model has {frame.model.ahn_config}")
        if frame is not self._frame:
            raise ConfigError("the cache was made for another model: expected one made by ahn.AHNCache(model)")
        if frame.model.dtype != self._dtype:
            raise ConfigError(
                f"the model is in {frame.model.dtype}, the cache was made in {self._dtype}: expected a new cache, "
                "which reads the text again"
            )
        if frame.adapter is not self._adapter:
            raise ConfigError(_OTHER_WEIGHTS)

    @torch.compiler.disable
    def check_weights(self, closely: bool = False) -> None:
        """`check_model`, and whether weights or adapters have changed since (`ahn.weights`). `closely`: a few numbers
        of each tensor are compared too, as they are where tensors were only moved."""
        from ahn.augmentation import frame_of

        self.check_model(frame_of(self._model))
        before, now = self._weights, self._frame.weights()
        if now[:2] != before[:2]:  # all but the places
            raise ConfigError(_OTHER_WEIGHTS)
        if self._sample is not None and (closely or now.places != before.places):
            if not weights.same(self._sample, weights.sample(self._model)):
                raise ConfigError(_OTHER_WEIGHTS)
            self._weights = now

    @contextmanager
    def in_use(self, again: bool = False) -> Iterator[None]:
        """Within, nothing else may use the cache. `again`: what this thread is doing with it goes on.

        Raises:
            UnsupportedOperationError: it is in use.
        """
        use, me, mine = self._use, threading.get_ident(), False
        if again and use.thread == me:
            yield
            return
        try:
            with deferred():
                mine = use.lock.acquire(blocking=False)
                if not mine:
                    raise UnsupportedOperationError(_IN_USE)
                use.thread, use.calls = me, use.calls + 1
            yield
        finally:
            if mine:
                with deferred():
                    use.thread = None
                    use.lock.release()

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Within, everything of the cache is as one call left it. Raises UnsupportedOperationError if another thread
        uses it, AHNError if a call failed half-way."""
        calls, mine = self._use.calls, self._use.thread == threading.get_ident()
        if self._use.thread is not None and not mine:
            raise UnsupportedOperationError(_IN_USE)
        self._check_whole()
        with self._frame.turn():  # a graph moves tensors of the caches that take turns
            yield
        if self._use.calls != calls:
            raise UnsupportedOperationError(_IN_USE)

    # One forward call: the augmented decoder opens it, every layer reads its span, the decoder closes it.
    def open_span(self, batch: int, length: int, mask: Tensor | None, ids: Tensor | None = None) -> Span:
        self._check_whole()
        if self._batch not in (None, batch):
            if self._batch != 1:
                raise ConfigError(f"batch of {batch} on a cache of {self._batch} rows: expected {self._batch}")
            self.batch_repeat_interleave(batch)  # one memory, several continuations of it
        real = None if mask is None else mask[:, -length:].bool().cpu()
        self._span, self._coming = Span.of(self._seen, length, real), (batch, ids)
        return self._span

    def _check_whole(self) -> None:
        if self._span is not None and self._span.written:
            raise AHNError("this cache was left half-written by a call that failed: go on from a fork or a saved file")

    def close_span(self) -> None:
        span, (self._batch, ids) = self._span, self._coming
        assert span is not None
        if self.archive is not None:
            if self._batch != 1 or ids is None:
                raise UnsupportedOperationError(
                    f"an archive of {self._batch} rows{'' if ids is not None else ' of embeddings'}: expected the ids "
                    "of one sequence; AHNCache(model) has no archive"
                )
            self.archive.add(span.compact(ids, 1)[0, : span.counts[0]])
        if self.transcript is not None and ids is not None:
            self.transcript.add(span.start.tolist(), span.counts, span.compact(ids, 1))
        seen = span.after()
        self._seen = seen[:1] if len(set(seen)) == 1 else seen
        if self._sample is None:
            self._sample = weights.sample(self._model)  # behind the first launches: a GPU computes meanwhile
        self.tokens_seen += span.length
        self._span, self._coming, self.last_logits = None, (0, None), None
        if self.transcript is not None and self.transcript.is_due:
            self.settle_transcript()

    def settle_transcript(self) -> None:
        """Drop the ids of tokens that no store keeps any more."""
        assert self.transcript is not None
        kept = [stored for layer in self.layers if (stored := layer.stored) is not None]
        self.transcript.settle(kept, self.config.sinks, self.config.window)

    @property
    def span(self) -> Span:
        assert self._span is not None
        return self._span

    # What transformers asks of a cache.
    def get_seq_length(self, layer_idx: int = 0) -> int:
        if vars(self._model).get("_ahn_frame") is not self._frame:
            raise ConfigError(_NO_MODEL)
        return self.tokens_seen

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._span is None:
            raise ConfigError(_NO_MODEL)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.tokens_seen + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows become copies of the rows `beam_idx` [B] (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self._batch or 1).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in self.layers:
            layer.select_rows(indices)
        if self.transcript is not None:
            self.transcript.select(indices.tolist())
        if len(self._seen) > 1:
            seen = [self._seen[i] for i in indices.tolist()]
            self._seen = seen[:1] if len(set(seen)) == 1 else seen
        if self.last_logits is not None:
            self.last_logits = self.last_logits.index_select(0, indices.to(self.last_logits.device))
        if self._batch is not None:
            self._batch = len(indices)

    def reset(self) -> None:
        """Forget everything, and give the memory back."""
        for layer in self.layers:
            for name in layer.tensors:
                setattr(layer, name, None)
            layer.is_initialized = False
        self.transcript = None if self.transcript is None else Transcript()
        self.archive = None if self.archive is None else self.archive.emptied()
        self._observe()
        self.tokens_seen, self._seen, self._batch, self._span, self.last_logits = 0, [0], None, None, None
        self.texts = []

    def activate_past_recording(self) -> None:
        raise UnsupportedOperationError("assisted decoding takes tokens back; a compressed memory cannot unread them")

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Raises UnsupportedOperationError: what was compressed cannot be taken out again. Use `fork` before."""
        raise UnsupportedOperationError(
            "a compressed memory cannot unread tokens (crop); fork the cache before reading"
        )


def _check_path(path: Any) -> None:
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"path={path!r}: expected the name of a memory file")


def _grown(old: Tensor | None, shape: tuple[int, ...], dim: int, like: Tensor) -> Tensor:
    new = torch.zeros(shape, dtype=like.dtype, device=like.device)
    if old is not None:
        new.narrow(dim, 0, old.shape[dim]).copy_(old)
    return new


def _select(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """index_select, without the copy where all is selected."""
    return x if len(index) == x.shape[dim] else x.index_select(dim, index)


def _expand(index: Tensor, x: Tensor, dim: int) -> Tensor:
    """[B, L] -> the shape of x, where L is the size of `dim` (1 or 2) and dimension 0 is the batch."""
    shape = list(x.shape)
    shape[dim] = index.shape[1]
    middle = (slice(None), None) if dim == 2 else (slice(None),)
    index = index[middle]
    return index.view(*index.shape, *([1] * (x.dim() - index.dim()))).expand(shape)


def gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Take tokens `index` [R, L] along `dim` of x."""
    index = index.to(x.device)
    if index.shape[0] == 1:
        return x.index_select(dim, index[0])
    return x.gather(dim, _expand(index, x, dim))
