"""One token a row for a whole model, as one CUDA graph that is captured once and replayed for each token.

Letters: B batch, T tokens, D hidden size; R rows of positions: 1 where all of the batch are at the same position,
else B.

A step of a 36-layer model is a thousand small kernels, which Python cannot launch as fast as a GPU runs them. Captured
in a graph they need one launch, but then nothing may depend on the host. The positions of a `DecodeBatch` are therefore
a tensor on the device. Layers treat it as any other batch (`AHNLayer._one`), and rows that evict nothing have gates of
zero. Work that few positions ask for (`AHNLayer.is_periodic`) is in a second graph of the same step; the host counts
positions and picks one of the two.

A graph reads and writes fixed addresses. So the tensors of a cache *lie in* the graph's buffers while it is decoded.
The first cache's tensors become the buffers. When another cache's turn comes, the one before it gets copies of its own,
if it still exists, and the new one is copied into the buffers. A cache can be read, saved and forked there as usual.
"""

from __future__ import annotations

import copy
import gc
import logging
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from ahn.compat import PAST
from ahn.engine.compile import compiled
from ahn.engine.fuse import fused_rotation, products
from ahn.memory.batch import FOREVER, ForwardBatch
from ahn.memory.buffer import LayerMemory
from ahn.memory.cache import AHNCache
from ahn.memory.handle import Handle
from ahn.memory.layer import AHNLayer
from ahn.ops import dispatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOM = 4096  # slots of a buffer, at least: one that grows is another buffer and needs another graph

logger = logging.getLogger("ahn")
_capturing = threading.RLock()  # of any model: garbage is not collected then


class Kind(NamedTuple):
    """Which form of a step: each has a graph of its own.

    `periodic`: with the work that few positions ask for. `filling`: rows whose store is not full may be among others,
    for which plain torch does the work of a kernel that takes every slot for filled.
    """

    periodic: bool
    filling: bool


class DecodeBatch(ForwardBatch):
    """One token a row at positions `start` [R] that only the device knows.

    The host takes every row for full, stores aside (`Kind.filling`); `start` masks whatever has not happened yet in a
    row.
    """

    on_device = True
    first = FOREVER

    def __init__(self, start: Tensor, kind: Kind, side: torch.cuda.Stream | None = None) -> None:
        super().__init__(start, 1, [1] * len(start))
        self.periodic, self.filling = kind
        self.side, self.divided = side, False

    def positions(self, device: torch.device) -> Tensor:
        return self.start[:, None]

    def real(self, device: torch.device) -> Tensor:
        return torch.ones_like(self.start, dtype=torch.bool)[:, None]

    @property
    def ends(self) -> Tensor:
        return self.start + 1

    def after(self) -> list[int]:
        return [0]  # there is room

    def side_stream(self, x: Tensor) -> AbstractContextManager[Any]:
        """On the stream `side`, as another branch of the graph."""
        if self.side is None:
            return nullcontext()
        self.side.wait_stream(torch.cuda.current_stream(x.device))
        x.record_stream(self.side)
        self.divided = True
        return torch.cuda.stream(self.side)

    def join(self) -> None:
        """Wait for what is done aside."""
        if self.divided and self.side is not None:
            torch.cuda.current_stream(self.side.device).wait_stream(self.side)


class Graph:
    """The decoder of a model for one token a row, and the buffers of the one cache that is being decoded from.

    Without CUDA nothing is captured and a replay is the step itself.

    Args:
        cache: its tensors become the buffers. rows: R.
    """

    def __init__(self, handle: Handle, cache: AHNCache, rows: int) -> None:
        self.handle, self.decoder, self.switches = handle, handle.decoder, handle.switches
        self.weights, self.kinds = _addresses(self.decoder), _one_of_a_kind(handle)
        device = handle.model.device
        with torch.inference_mode(False):
            self.ids = torch.zeros(cache.batch_size, 1, dtype=torch.long, device=device)
            self.position_ids = torch.zeros_like(self.ids)
            self.start = torch.zeros(rows, dtype=torch.long, device=device)
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.layers: list[LayerMemory] = [copy.copy(layer) for layer in cache.layers]
        self._lent_to = weakref.ref(cache)
        self._next: list[int] | None = None  # what `start` holds
        self._captured: dict[Kind, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # and their output

    def __call__(self, cache: AHNCache, ids: Tensor, position_ids: Tensor | None, kind: Kind) -> Tensor:
        """Last hidden states [B, 1, D] of tokens `ids` [B, 1], the next of `cache`, whose batch is open.
        `position_ids`: rotary positions [B or 1, 1], or None where they count the tokens seen. `kind`: after
        `prepare`."""
        self._lend(cache)
        start = cache.forward_batch.start.tolist()
        if start != self._next:
            self.start.copy_(cache.forward_batch.start)
        self._next = [position + 1 for position in start]
        self.ids.copy_(ids)
        if position_ids is None:
            self.position_ids.fill_(cache.tokens_seen)
        else:
            self.position_ids.copy_(position_ids)
        cache.forward_batch.written = True
        if kind not in self._captured:
            return self._run(self._shell(cache, self.layers), kind)
        graph, hidden = self._captured[kind]
        graph.replay()
        return hidden.clone()

    def prepare(self, cache: AHNCache, kind: Kind) -> None:
        """Capture a step of this kind, if it is to be captured and has not been yet."""
        if self.start.device.type == "cuda" and kind not in self._captured:
            self._capture(cache, kind)
            self._next = None  # the warm-up has counted too

    def fits(self, cache: AHNCache, rows: int) -> bool:
        """Whether the graph fits caches of this shape, with rows at `rows` positions; weights must be at the same
        addresses, and adapters of peft unchanged."""
        if self.switches is not self.handle.switches:
            return False
        if rows != len(self.start) or self.weights != _addresses(self.decoder):
            return False
        return _lies_in(cache, self.layers) or [*map(_form, cache.layers)] == [*map(_form, self.layers)]

    def _run(self, cache: AHNCache, kind: Kind) -> Tensor:
        cache._forward_batch = step = DecodeBatch(self.start, kind, self._side)
        out = type(self.decoder).forward(
            self.decoder, input_ids=self.ids, position_ids=self.position_ids, use_cache=True, **{PAST: cache}
        )
        step.join()
        self.start.add_(1)
        return out.last_hidden_state

    def _shell(self, cache: AHNCache, layers: list[LayerMemory]) -> AHNCache:
        """A cache to run with, whose counters do not matter."""
        shell = cache.shell()
        shell.layers = layers
        return shell

    def _capture(self, cache: AHNCache, kind: Kind) -> None:
        with _capturing:
            self._capture_alone(cache, kind)

    def _capture_alone(self, cache: AHNCache, kind: Kind) -> None:
        # A step cannot be taken back, so the warm-up has buffers of its own, which all layers share.
        scratch: dict[str, LayerMemory] = {}
        for layer in self.layers:
            if _form(layer) not in scratch:
                scratch[_form(layer)] = spare = copy.copy(layer)
                for name, tensor in layer.tensors.items():
                    setattr(spare, name, torch.zeros_like(tensor))
        device = self.start.device.type
        with ExitStack() as faster:
            if dispatch.pick_products(device, len(self.ids)).name == "gemv":
                faster.enter_context(products(self.decoder))
            if dispatch.pick_one_token(device).name == "triton":
                faster.enter_context(fused_rotation(self.decoder))
            if dispatch.pick_between(device).name == "inductor":
                faster.enter_context(compiled(self.decoder))
            self._record([scratch[_form(layer)] for layer in self.layers], cache, kind)

    def _record(self, scratch: list[LayerMemory], cache: AHNCache, kind: Kind) -> None:
        device = self.start.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(2):
                self._run(self._shell(cache, scratch), kind)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # one pool is enough for all: they are replayed one after the other
        pool = next((captured.pool() for captured, _ in self._captured.values()), None)
        # torch's own stream for captures is on the device of the first one
        with _nothing_freed(), torch.cuda.graph(graph, pool, side, capture_error_mode="thread_local"):
            hidden = self._run(self._shell(cache, self.layers), kind)
        self._captured[kind] = graph, hidden

    def _lend(self, cache: AHNCache) -> None:
        """Make the tensors of `cache` the buffers."""
        if _lies_in(cache, self.layers):
            return
        before = self._lent_to()
        if before is not None and before is not cache:
            for theirs, ours in zip(before.layers, self.layers, strict=True):
                for name, buffer in ours.tensors.items():
                    if getattr(theirs, name) is buffer:
                        setattr(theirs, name, buffer.clone())
        for theirs, ours in zip(cache.layers, self.layers, strict=True):
            for name, buffer in ours.tensors.items():
                buffer.copy_(getattr(theirs, name))
                setattr(theirs, name, buffer)
        self._lent_to = weakref.ref(cache)


def forward(handle: Handle, **kwargs: Any) -> Any:
    """The forward call of an augmented model's decoder: replays a graph for one token a row where it can, else runs
    the decoder itself."""
    if not torch.compiler.is_compiling() and (found := _graph(handle, kwargs)):
        (graph, kind), cache = found, kwargs[PAST]
        with dispatch.on(graph.start.device):
            hidden = graph(cache, kwargs["input_ids"], kwargs.get("position_ids"), kind)
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{PAST: cache})
    decoder = handle.decoder
    return type(decoder).forward(decoder, **kwargs) if handle.forward is None else handle.forward(**kwargs)


def goes_on(handle: Handle, cache: AHNCache) -> bool:
    """Whether the next tokens of `cache` can be steps of the graph that is there, or of the first one."""
    graph, batch = handle.graph, ForwardBatch.of(cache.tokens_per_row, 1, None)
    if not cache.tokens_seen or len(batch.start) > 1 or not _steps(handle, batch, cache):
        return False
    return graph is None or graph.fits(cache, 1)


def _steps(handle: Handle, batch: ForwardBatch, cache: AHNCache) -> bool:
    """Whether one token a row of `cache`, those of `batch`, can be a step of a graph."""
    if handle.no_graph is None:
        handle.no_graph = _obstacle(handle.model)
    if handle.no_graph or dispatch.pick_decoding(handle.model.device.type).name != "graph":
        return False
    return all(layer.steps_on_device and (cache.has_room or layer.is_full(batch)) for layer in _kinds(handle))


def _graph(handle: Handle, kwargs: dict[str, Any]) -> tuple[Graph, Kind] | None:
    """The graph for this call, made now if there is none of its shape, and the kind of the step; None if the call
    needs more than one graph."""
    cache, ids = kwargs.get(PAST), kwargs.get("input_ids")
    if ids is None or not isinstance(cache, AHNCache) or cache._forward_batch is None:
        return None
    batch = cache.forward_batch
    if batch.length != 1 or batch.padded or not cache.tokens_seen:
        return None
    if not _steps(handle, batch, cache):
        return None
    if torch.is_grad_enabled() or torch.is_autocast_enabled(ids.device.type):
        return None
    understood = ("input_ids", "position_ids", "attention_mask", PAST, "use_cache", "return_dict")
    if any(value is not None and value is not False for name, value in kwargs.items() if name not in understood):
        return None
    config = handle.decoder.config
    wanted = ("output_hidden_states", "output_attentions")
    if any(getattr(config, name, False) for name in wanted) or kwargs.get("use_cache") is False:
        return None
    layers, room = _kinds(handle), max(batch.first + 1, ROOM)
    kind = Kind(any(layer.is_periodic(batch) for layer in layers), not all(layer.is_full(batch) for layer in layers))
    for memory in cache.layers:
        assert memory.keys is not None
        state = None if memory.state is None else memory.state.shape[1:]
        memory.reserve(room, memory.keys, state)
    try:
        if handle.graph is None or not handle.graph.fits(cache, len(batch.start)):
            handle.graph = None  # its buffers go before others come
            handle.graph = Graph(handle, cache, len(batch.start))
        with dispatch.on(handle.graph.start.device):
            handle.graph.prepare(cache, kind)
    except (RuntimeError, AssertionError) as error:  # this base cannot be captured or compiled
        handle.graph, handle.no_graph = None, str(error).splitlines()[0]
        logger.warning("decoding without a CUDA graph: %s", handle.no_graph)
        return None
    return handle.graph, kind


@contextmanager
def _nothing_freed() -> Iterator[None]:
    """Within, Python collects no garbage: it may hold the graph of a deleted model, and freeing a graph ends the
    capture of another."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _kinds(handle: Handle) -> list[AHNLayer]:
    """A layer of each row of tiers, as the graph has noted them."""
    return _one_of_a_kind(handle) if handle.graph is None else handle.graph.kinds


def _one_of_a_kind(handle: Handle) -> list[AHNLayer]:
    """A layer of each row of tiers."""
    return [*{(type(layer.kept), type(layer.last)): layer for layer in handle.layers}.values()]


def _obstacle(model: PreTrainedModel) -> str:
    """The reason why this model cannot be one graph, or nothing."""
    devices = {parameter.device for parameter in model.parameters()}
    return "the weights are on several devices" if len(devices) > 1 else ""


def _addresses(decoder: Any) -> list[int]:
    """Addresses of a sample of the weights, checked with every token."""
    return [weight.data_ptr() for weight in decoder.layers[-1].self_attn.parameters()]


def _form(layer: LayerMemory) -> str:
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in layer.tensors.items()}
    return f"{layer.window} {layer.sinks} {shapes}"


def _lies_in(cache: AHNCache, layers: list[LayerMemory]) -> bool:
    return all(
        theirs.keys is ours.keys and theirs.state is ours.state
        for theirs, ours in zip(cache.layers, layers, strict=True)
    )
