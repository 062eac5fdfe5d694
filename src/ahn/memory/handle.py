"""The one object that `ahn.augment` sets on a model; the model's layers are reached through it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ahn import weights
from ahn.config import AHNConfig
from ahn.errors import ConfigError, UnsupportedModelError
from ahn.memory.calls import Full
from ahn.memory.head_keys import RetrievalHeads
from ahn.memory.layer import AHNLayer
from ahn.ops import dispatch
from ahn.ops.rotary import CHANGING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Handle:
    """The memories of a model, the state its calls share, and everything that `detach` has to undo.

    Attributes:
        config: the settings; `resize` changes them. names: of "base" and "adapter", for people and memory files.
        retrieval: the heads of the base that find passages (`ahn.recall`), or None.

    Users see these three as `model.ahn_config`, `model.ahn_names` and `model.ahn_retrieval` (`ahn.hf.attributes`).
    """

    def __init__(self, model: PreTrainedModel, config: AHNConfig) -> None:
        self.model, self.decoder, self.layers = model, model.get_decoder(), list[AHNLayer]()
        self.config = config
        self.retrieval: RetrievalHeads | None = None
        self.names: dict[str, str | None] = {"base": model.config._name_or_path or None, "adapter": None}
        self.forward = vars(self.decoder).get("forward")  # the decoder's own, of accelerate, say, or None
        self.adapter = object()  # another one with each adapter that is loaded
        self._begin()
        self.attention = model.config._attn_implementation
        # by name: parameters may be replaced by their shards, and a reference would keep the whole ones in memory
        self.trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.hooks: list[Any] = []
        self.no_graph: str | None = None  # the reason why there is no graph; None: not checked yet
        # tokens of questions read by the graph: after `generate.FEW_AT_FIRST` of them fla is worth its import
        self.asked = 0
        self.switches: list[Any] = []  # a new list once peft switches adapters, which a graph has built in
        self.full: dict[int, Full] = {}  # by thread, within `full_attention`
        self.vocabulary = model.get_input_embeddings().num_embeddings
        # rotary module, and its type and frequencies before `hold_frequencies`
        self.held: tuple[Any, str, Tensor] | None = None

    def resize(self, window: int, sinks: int, store_size: int) -> None:
        """Other sizes from now on, for new caches and whole sequences. Raises ConfigError if they are none."""
        config = self.config.replace(window=window, sinks=sinks, store_size=store_size)
        for layer in self.layers:
            layer.resize(window, sinks, store_size)
        self.config = config

    def _begin(self) -> None:
        self.graph: Any = None  # of one token, an `ahn.engine.graph.Graph`, or None
        self.lock = threading.RLock()
        self.stream: torch.cuda.Stream | None = None  # of the last turn

    def __getstate__(self) -> dict[str, Any]:
        """For copies of the model: graph and lock stay."""
        return {name: value for name, value in vars(self).items() if name not in ("graph", "lock", "stream")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    @contextmanager
    def turn(self, device: torch.device | None = None) -> Iterator[None]:
        """Within, no other thread uses the model if calls share the buffers and changed modules of a graph."""
        device = device or self.model.device
        if not dispatch.in_turn(device.type):
            yield
            return
        with self.lock:
            if device.type == "cuda":
                stream = torch.cuda.current_stream(device)
                if self.stream is not None and self.stream != stream:
                    stream.wait_stream(self.stream)
                self.stream = stream
            yield

    def weights(self) -> weights.State:
        """The weights of model and memory as they are now, for a comparison. Raises UnsupportedModelError if those of
        the memory are not there, or have become something else."""
        check_memory(self.layers)
        found = weights.state(self.model)
        if found.switches != self.switches:
            self.switches = found.switches
        return found

    def hold_frequencies(self) -> None:
        """Keep the rotary frequencies of short texts if the base changes them with the length ("dynamic", "longrope"):
        no key is attended further away than sinks + window, and one text has one set of frequencies.
        """
        rotary: Any = getattr(self.decoder, "rotary_emb", None)
        kind = getattr(rotary, "rope_type", None)
        if kind not in CHANGING:
            return
        self.held = rotary, kind, rotary.inv_freq
        rotary.rope_type = "default"
        rotary.inv_freq = rotary.original_inv_freq.to(rotary.inv_freq.device, copy=True)

    def release_frequencies(self) -> None:
        if self.held is not None:
            rotary, kind, frequencies = self.held
            rotary.rope_type, rotary.inv_freq = kind, frequencies.to(rotary.inv_freq.device)


def base_of(model: Any) -> Any:
    """The transformers model itself, if it is wrapped by peft."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def handle_of(model: Any) -> Handle:
    """The handle of an augmented model. Raises ConfigError if the model has no memories."""
    handle: Handle | None = getattr(base_of(model), "_ahn", None)
    if handle is None:
        raise ConfigError("the model has no memories: ahn.augment(model, config) first")
    return handle


def layers_of(model: PreTrainedModel) -> list[AHNLayer]:
    """The memories of an augmented model, layer by layer. Raises ConfigError if it has none."""
    return list(handle_of(model).layers)


def check_memory(layers: list[AHNLayer]) -> None:
    """Raises UnsupportedModelError if the weights of a memory are offloaded, or have been given adapters."""
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if hasattr(module, "base_layer"):
                raise UnsupportedModelError(
                    f"layer {index}: an adapter such as LoRA sits on {name} of the memory itself: expected one on the "
                    r"base alone, with exclude_modules=r'.*\.ahn\..*'"
                )
        if any(parameter.is_meta for parameter in layer.parameters()):
            raise UnsupportedModelError(
                f"layer {index}: the memory's weights are offloaded to CPU or disk: expected them on their device"
            )
