"""AHNCache: the memory of a sequence, of constant size once the window is full.

Letters: B batch, M key/value heads, T tokens. Each layer has a buffer (`ahn.memory.buffer`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ahn import fingerprint, weights
from ahn.errors import AHNError, ConfigError, UnsupportedOperationError
from ahn.interrupts import deferred
from ahn.memory import file
from ahn.memory.archive import Archive, new_archive
from ahn.memory.batch import ForwardBatch
from ahn.memory.handle import Handle, base_of, handle_of, layers_of
from ahn.memory.transcript import TEXT, Transcript
from ahn.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_IN_USE = "this cache is in use by another call: expected one call at a time; fork it for another"
_OTHER_WEIGHTS = (
    "the weights of the model have changed since the cache was made: expected a new cache, which reads the text again"
)
_NO_MODEL = (
    "the model has no memories, or others than those that the cache was made for: expected a cache made by "
    "ahn.AHNCache(model) for the model as it is now"
)


class _Use:
    """The user of a cache: at most one thread, for one call."""

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
        texts: notes of the command line on each text that was read, to know it again: its number of `tokens`, the
            `sha256` of their ids, whether it is `complete`, and name and digest of its `documents` if it is.
        transcript: with a store, the ids of the tokens it keeps (`ahn.memory.transcript`); not counted in `nbytes`.
        archive: everything that was read, on the host, or None (`ahn.memory.archive`); not counted in `nbytes`.

    Args:
        archive: "none"; "text" keeps the ids of everything that is read, so that `ahn.ask` can find passages in it and
            read them again; "keys" also the keys of the adapter's retrieval heads. For one sequence, not for a batch.

    Raises:
        ConfigError: the model is not augmented, there is no such archive, or the model has no retrieval heads.
    """

    has_room = False  # whether buffers have all the slots that they will ever need, from the first token on

    def __init__(self, model: PreTrainedModel, archive: str = "none") -> None:
        super().__init__(layers=[layer.memory() for layer in layers_of(model)])
        self._handle = handle_of(model)
        self._model = self._handle.model
        self._dtype = self._model.dtype
        self._adapter, self._weights = self._handle.adapter, self._handle.weights()
        self._sample: weights.Sample | None = None  # of the weights at the first reading
        self._fingerprint: str | None = None  # of the model, once it was needed
        self.config = self._handle.config
        self.tokens_seen = 0
        self.texts: list[dict[str, Any]] = []
        self.last_logits: Tensor | None = None
        self._use = _Use()
        self._seen = [0]  # real tokens by row: one number while all rows are alike
        self._batch: int | None = None
        self._forward_batch: ForwardBatch | None = None
        self._coming: tuple[int, Tensor | None] = 0, None  # rows and ids of the forward batch
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
        return self.twin(lambda layers: [layer.map(torch.Tensor.clone) for layer in layers])

    def twin(self, copied: Callable[[list[Any]], list[Any]], archive: bool = True) -> AHNCache:
        """A fork whose layers `copied` makes of those of this cache; without `archive` it keeps none."""
        with self._at_rest():
            twin = self.shell()
            twin._use, twin._forward_batch = _Use(), None
            twin.layers = copied(self.layers)
            twin.transcript = None if self.transcript is None else self.transcript.copy()
            twin._seen, twin.texts = list(self._seen), list(self.texts)
            twin.archive = self.archive.copy() if archive and self.archive is not None else None
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
        """Write everything to one file, whole or not at all (see `ahn.memory.file`).

        Raises:
            MemoryFileError: nothing was read yet, or the file cannot be written.
            ConfigError: the model's weights are no longer those that the memory was read with.
            UnsupportedOperationError: another thread is using the cache.
        """
        _check_path(path)
        self.check_weights(closely=True)
        with self._at_rest():
            file.save(self, path)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> AHNCache:
        """Read a file written by `save` for the same model and adapter.

        The model takes window, sinks and store size from the file. Caches that it has with other sizes are refused
        until it has theirs again.

        Raises:
            MemoryFileError: damaged, or of another model; says in what they differ.
        """
        _check_path(path)
        return file.load(path, base_of(model), cls)

    def describe(self) -> dict[str, Any]:
        """The header of a memory file of this cache. Raises ConfigError if the model is no longer the one that an
        earlier file was of."""
        found = fingerprint.fingerprint(self._model)
        if self._fingerprint not in (None, found):
            raise ConfigError(_OTHER_WEIGHTS)
        self._fingerprint = found
        return {
            "package": __version__,
            "config": self.config.to_dict(),
            "dtype": str(self._model.dtype),
            "fingerprint": found,
            "tokens_seen": self.tokens_seen,
            "seen": self._seen,
            "batch": self._batch,
            "texts": self.texts,
            **self._handle.names,
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

    # Its user, and the weights it is used with.
    def check_model(self, handle: Handle) -> None:
        """Raises ConfigError unless the cache was made for the model of `handle`, as it is now."""
        if self.config != handle.config:
            raise ConfigError(f"the cache was made for {self.config}, the model has {handle.config}")
        if handle is not self._handle:
            raise ConfigError("the cache was made for another model: expected one made by ahn.AHNCache(model)")
        if handle.model.dtype != self._dtype:
            raise ConfigError(
                f"the model is in {handle.model.dtype}, the cache was made in {self._dtype}: expected a new cache, "
                "which reads the text again"
            )
        if handle.adapter is not self._adapter:
            raise ConfigError(_OTHER_WEIGHTS)

    @torch.compiler.disable
    def check_weights(self, closely: bool = False) -> None:
        """`check_model`, and whether weights or adapters have changed since (`ahn.weights`). `closely`: a few numbers
        of each tensor are compared too, as they are where tensors were only moved."""
        self.check_model(handle_of(self._model))
        before, now = self._weights, self._handle.weights()
        if now[:2] != before[:2]:  # all but the places
            raise ConfigError(_OTHER_WEIGHTS)
        if self._sample is not None and (closely or now.places != before.places):
            if not weights.same(self._sample, weights.sample(self._model)):
                raise ConfigError(_OTHER_WEIGHTS)
            self._weights = now

    @contextmanager
    def in_use(self, again: bool = False) -> Iterator[None]:
        """Within, nothing else may use the cache. `again`: this thread may be using it already.

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
        """Within, the cache is as a call has left it. Raises UnsupportedOperationError if another thread
        uses it, AHNError if a call failed half-way."""
        calls, mine = self._use.calls, self._use.thread == threading.get_ident()
        if self._use.thread is not None and not mine:
            raise UnsupportedOperationError(_IN_USE)
        self._check_whole()
        with self._handle.turn():  # a graph moves tensors of the caches that take turns
            yield
        if self._use.calls != calls:
            raise UnsupportedOperationError(_IN_USE)

    # One forward call: the augmented decoder opens it, every layer reads its batch, the decoder closes it.
    def open_batch(self, batch: int, length: int, mask: Tensor | None, ids: Tensor | None = None) -> ForwardBatch:
        self._check_whole()
        if self._batch not in (None, batch):
            if self._batch != 1:
                raise ConfigError(f"batch of {batch} on a cache of {self._batch} rows: expected {self._batch}")
            self.batch_repeat_interleave(batch)  # one memory, several continuations of it
        real = None if mask is None else mask[:, -length:].bool().cpu()
        self._forward_batch, self._coming = ForwardBatch.of(self._seen, length, real), (batch, ids)
        return self._forward_batch

    def _check_whole(self) -> None:
        if self._forward_batch is not None and self._forward_batch.written:
            raise AHNError("this cache was left half-written by a call that failed: go on from a fork or a saved file")

    def close_batch(self) -> None:
        batch, (self._batch, ids) = self._forward_batch, self._coming
        assert batch is not None
        if self.archive is not None:
            if self._batch != 1 or ids is None:
                raise UnsupportedOperationError(
                    f"an archive of {self._batch} rows{'' if ids is not None else ' of embeddings'}: expected the ids "
                    "of one sequence; AHNCache(model) has no archive"
                )
            self.archive.add(batch.compact(ids, 1)[0, : batch.counts[0]])
        if self.transcript is not None and ids is not None:
            self.transcript.add(batch.start.tolist(), batch.counts, batch.compact(ids, 1))
        seen = batch.after()
        self._seen = seen[:1] if len(set(seen)) == 1 else seen
        if self._sample is None:
            self._sample = weights.sample(self._model)  # behind the first launches: a GPU computes meanwhile
        self.tokens_seen += batch.length
        self._forward_batch, self._coming, self.last_logits = None, (0, None), None
        if self.transcript is not None and self.transcript.is_due:
            self.trim_transcript()

    def trim_transcript(self) -> None:
        """Drop the ids of tokens that no store keeps any more."""
        assert self.transcript is not None
        kept = [stored for layer in self.layers if (stored := layer.stored) is not None]
        self.transcript.trim(kept, self.config.sinks, self.config.window)

    @property
    def forward_batch(self) -> ForwardBatch:
        assert self._forward_batch is not None
        return self._forward_batch

    # The interface of a transformers cache.
    def get_seq_length(self, layer_idx: int = 0) -> int:
        if vars(self._model).get("_ahn") is not self._handle:
            raise ConfigError(_NO_MODEL)
        return self.tokens_seen

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._forward_batch is None:
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
        self.tokens_seen, self._seen, self._batch, self._forward_batch, self.last_logits = 0, [0], None, None, None
        self.texts = []

    def activate_past_recording(self) -> None:
        raise UnsupportedOperationError("assisted decoding takes tokens back; a compressed memory cannot unread them")

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Raises UnsupportedOperationError: compressed tokens cannot be taken out again. Use `fork` before."""
        raise UnsupportedOperationError(
            "a compressed memory cannot unread tokens (crop); fork the cache before reading"
        )


def _check_path(path: Any) -> None:
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"path={path!r}: expected the name of a memory file")
