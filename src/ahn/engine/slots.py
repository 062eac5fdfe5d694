"""Slots: memories of fixed size for several sequences, one in each row of the same tensors.

A slot has all the room that a sequence ever takes: sinks, store, window, gate inputs and state. So what a slot costs is
known before anything is read, and a sequence is moved in and out by copying rows. A sequence in a slot is an ordinary
AHNCache whose tensors are views of its row; it is read into as anywhere. The first rows together are a cache too
(`Front`), with which one token a row is decoded, whatever the positions of the rows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ahn.compat import PAST
from ahn.engine.graph import Graph
from ahn.engine.patch import patched
from ahn.errors import ConfigError
from ahn.memory.batch import ForwardBatch
from ahn.memory.buffer import LayerMemory
from ahn.memory.cache import AHNCache
from ahn.memory.handle import Handle, handle_of
from ahn.ops import dispatch
from ahn.ops.ranks import empty_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BY_TOKEN = {"keys": 2, "values": 2, "inputs": 1}  # tensors with a number of tokens, and the dimension of it


class Front(AHNCache):
    """The first rows of some slots, for one token a row.

    Attributes:
        starts: the position of the token, by row.
    """

    has_room = True

    def __init__(self, model: PreTrainedModel, layers: list[LayerMemory], rows: int) -> None:
        super().__init__(model)
        self.layers, self.transcript, self._batch = layers, None, rows
        self.tokens_seen = 1  # some; positions are counted by row
        self.starts: list[int] = []

    def open_batch(self, batch: int, length: int, mask: Tensor | None, ids: Tensor | None = None) -> ForwardBatch:
        """Rows keep their own positions, also where all are alike: a graph is captured with as many as there are."""
        self._forward_batch = ForwardBatch(torch.tensor(self.starts), length, [length] * batch)
        return self._forward_batch

    def close_batch(self) -> None:
        self._forward_batch = None


class Slots:
    """The memories of several sequences at once.

    Args:
        count: slots whose sequences may be decoded together; a call takes the first ones. behind: further slots.

    Raises:
        ConfigError: a layer of the model keeps everything, so that no size is enough.
    """

    def __init__(self, model: PreTrainedModel, count: int, behind: int = 0) -> None:
        self.model, self.count, self._handle = model, count, handle_of(model)
        self.layers = _buffers(self._handle, count + behind)
        self._fronts: dict[int, Front] = {}
        self._graphs: dict[int, Graph | None] = {}

    @staticmethod
    def nbytes_of_one(model: PreTrainedModel) -> int:
        """Bytes of a slot."""
        return sum(layer.nbytes for layer in _buffers(handle_of(model), 1, torch.device("meta")))

    def open(self, row: int, memory: AHNCache | None = None, observed: bool = False) -> AHNCache:
        """A copy of `memory` in the slot `row`, or an empty one; what was in the slot is overwritten.

        Args:
            observed: go on with the archive of `memory`; else what is read is kept in none.

        Raises:
            UnsupportedOperationError: another thread uses `memory`.
        """
        views = self._views(row, 1)
        for view in views:
            _clear(view)

        def fill(layers: list[LayerMemory]) -> list[LayerMemory]:
            for layer, view in zip(layers, views, strict=True):
                _pour(layer, view)
            return views

        if memory is not None:
            twin = memory.twin(fill, archive=observed)
            if twin.transcript is not None:
                twin.transcript.to(self.model.device)
            return twin
        cache = AHNCache(self.model)
        cache.layers = views
        return cache

    def move(self, cache: AHNCache, row: int) -> None:
        """Move a sequence to another slot."""
        views = self._views(row, 1)
        for layer, view in zip(cache.layers, views, strict=True):
            for name, tensor in view.tensors.items():
                tensor.copy_(getattr(layer, name))
        cache.layers = views

    def note_read(self, cache: AHNCache, ids: list[int]) -> None:
        """Note that a sequence has been given these tokens as a row of a `front`."""
        if cache.transcript is not None:
            cache.transcript.add([cache.tokens_seen], [len(ids)], torch.tensor([ids], device=self.model.device))
        cache.tokens_seen += len(ids)
        cache._seen, cache._batch, cache.last_logits = [cache.tokens_seen], 1, None

    def copy_out(self, cache: AHNCache) -> AHNCache:
        """A copy of a sequence on the host, with no more room than it needs."""
        seen = cache.tokens_seen
        twin = cache.twin(lambda layers: [_trimmed(layer, seen) for layer in layers])
        twin.last_logits = None if twin.last_logits is None else twin.last_logits.cpu()
        if twin.transcript is not None:
            twin.transcript.to("cpu")
        return twin

    def warm(self) -> None:
        """Capture the graphs of all numbers of rows, with what is in nobody's slots."""
        wanted = {self._rows(count, self.model.device) for count in range(1, self.count + 1)}
        if dispatch.pick_decoding(self.model.device.type).name == "graph":
            for rows in sorted(wanted):
                for position in (0, self._handle.config.lossless):
                    self.step([0] * rows, [position] * rows)

    def step(self, tokens: list[int], positions: list[int]) -> Tensor:
        """Logits [B, V] after one token in each of the first slots, at its position in its sequence."""
        device = self.model.device
        rows = self._rows(len(tokens), device)
        spare = rows - len(tokens)  # slots that nobody has, and that anything may be written into
        tokens, positions = tokens + tokens[:1] * spare, positions + positions[:1] * spare
        front = self._front(rows)
        front.starts = positions
        ids, places = torch.tensor([tokens, positions], device=device)[..., None]
        with self._handle.turn(), self._graph(rows):
            out = self.model(input_ids=ids, position_ids=places, **{PAST: front}, use_cache=True).logits
        return out[: rows - spare, -1]

    def _rows(self, wanted: int, device: torch.device) -> int:
        """Rows to compute: with a graph few numbers, each of which is captured once."""
        if dispatch.pick_decoding(device.type).name != "graph":
            return wanted
        return min(self.count, 1 << (wanted - 1).bit_length())

    @contextmanager
    def _graph(self, rows: int) -> Iterator[None]:
        """Within, the model has the graph of so many rows, which is captured when it is first needed."""
        handle = self._handle
        before, handle.graph = handle.graph, self._graphs.get(rows)
        try:
            yield
        finally:
            self._graphs[rows], handle.graph = handle.graph, before

    def _front(self, rows: int) -> Front:
        """Always the same object, in whose tensors the graph lies."""
        if rows not in self._fronts:
            self._fronts[rows] = Front(self.model, self._views(0, rows), rows)
        return self._fronts[rows]

    def _views(self, first: int, count: int) -> list[LayerMemory]:
        return [layer.map(lambda tensor: tensor.narrow(0, first, count)) for layer in self.layers]


def bytes_of_weights(model: PreTrainedModel) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def bytes_of_chunk(model: PreTrainedModel, chunk: int, rows: int) -> int:
    """An upper bound, as measured, of what activations take while `chunk` tokens are read: some numbers a token in each
    layer, and copies of one layer's window. Also the logits of one token a row."""
    config: Any = model.config.get_text_config()
    numbers = chunk * (16 * config.hidden_size + 6 * config.intermediate_size)
    window = 4 * Slots.nbytes_of_one(model) // config.num_hidden_layers
    return numbers * max(4, model.dtype.itemsize) + window + 8 * rows * config.vocab_size


@contextmanager
def eager(handle: Handle) -> Iterator[None]:
    """Within, no graph takes the tensors of a cache for its own, which is a row of slots."""
    with handle.turn(), patched(handle, "no_graph", "slots are read into where they lie"):
        yield


def _buffers(handle: Handle, rows: int, device: torch.device | None = None) -> list[LayerMemory]:
    """Memories of `rows` rows with all the room that they ever need, by layer."""
    found = []
    for index, (layer, block) in enumerate(zip(handle.layers, handle.decoder.layers, strict=True)):
        if layer.window is None:
            raise ConfigError(
                f"layer {index} keeps everything (layers={handle.config.layers}): expected a window in every layer"
            )
        attention: Any = block.self_attn
        heads = getattr(attention.config, "num_key_value_heads", None) or attention.config.num_attention_heads
        home = device or attention.o_proj.weight.device
        k = torch.empty(rows, heads, 0, attention.head_dim, dtype=handle.model.dtype, device=home)
        found.append(memory := layer.memory())
        memory.reserve(layer.sinks + layer.window + 1, k, layer.state_shape)
    return found


def _clear(view: LayerMemory) -> None:
    """Nothing stays of who was there before."""
    for name, tensor in view.tensors.items():
        if name == "ranks":
            tensor.copy_(empty_ranks(1, tensor.shape[1], tensor.shape[2], tensor.device))
        else:
            tensor.zero_()


def _pour(layer: LayerMemory, view: LayerMemory) -> None:
    """Copy a memory of any size into an empty slot: places of a store may have to be left free."""
    gap = view.shift - layer.shift
    for name, tensor in layer.tensors.items():
        target: Tensor = getattr(view, name)
        if name not in BY_TOKEN:
            target.copy_(tensor)
            continue
        dim = BY_TOKEN[name]
        length = tensor.shape[dim]
        before = min(layer.sinks, length) if gap else length
        target.narrow(dim, 0, before).copy_(tensor.narrow(dim, 0, before))
        if length > before:
            target.narrow(dim, before + gap, length - before).copy_(tensor.narrow(dim, before, length - before))


def _trimmed(view: LayerMemory, seen: int) -> LayerMemory:
    """A copy on the host of a slot that `seen` tokens were read into."""
    assert view.window is not None
    twin, full = copy.copy(view), seen > view.sinks + view.window
    for name, tensor in view.tensors.items():
        if not full and name == "ranks":
            setattr(twin, name, None)
            continue
        if not full and name in BY_TOKEN:
            dim = BY_TOKEN[name]
            before = min(view.sinks, seen)
            parts = tensor.narrow(dim, 0, before), tensor.narrow(dim, view.sinks + view.shift, seen - before)
            tensor = torch.cat(parts, dim)
        setattr(twin, name, tensor.to("cpu", copy=True).contiguous())
    return twin
