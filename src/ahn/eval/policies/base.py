"""What a policy is: a base model that reads a prompt of any length in its own way, and answers greedily.

A policy is one file of this folder with one class, found under the file's name (`ahn_zeroed.py` is `ahn-zeroed`).
All are read in chunks through a cache, so that memory use is the cache's, and all that is compared is the cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ahn import cells
from ahn.adapter import Adapter, base_shape, check_shape, default_config, read_adapter
from ahn.augmentation import CHUNK, check_fits, layers_of
from ahn.bases import load_base, load_tokenizer
from ahn.cache import AHNCache
from ahn.config import AHNConfig
from ahn.cost import Shape
from ahn.errors import ConfigError
from ahn.generation import read_chunks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Stored(NamedTuple):
    """A store that takes its places from the window: `AHNConfig.store`, `store_size`, `store_span`."""

    name: str
    size: int
    span: int = 1

    def fill(self, config: AHNConfig) -> AHNConfig:
        """`config` with this store, and as many lossless tokens as before. Raises ConfigError."""
        if self.size >= config.window:
            raise ConfigError(f"store_size={self.size} of {config.lossless} lossless tokens leaves no window")
        window = config.window - self.size
        return config.replace(window=window, store=self.name, store_size=self.size, store_span=self.span)


class Policy:
    """A base model with one way to remember; the model is loaded here.

    Args:
        base: hub id, folder, GGUF file, or "smollm2-135m".
        window, sinks: tokens kept exactly, by the policies that do not keep everything.
        adapter: the trained memory under comparison: a shipped one's name, a folder or a hub id. The baselines take
            from it what must be equal: which layers forget, how far away the sinks are seen, and the bytes of the cell.
        dtype: default float32 on a CPU, bfloat16 on CUDA. device: default CUDA if there is one.
        yarn: factor by which `full` extends the base's positions; the others ignore it.
        store: of the policies that have one; its places are part of `window`, so that all keep as many tokens.

    Attributes:
        tokenizer: the base's.
        context: the longest input and answer in tokens, None where there is no limit.
        lossless: tokens kept exactly, None for all of them.

    Raises:
        ConfigError: as `check`. BaseModelError, UnsupportedModelError, AdapterError.
    """

    name: ClassVar[str]
    needs_adapter: ClassVar[bool] = False
    uses_window: ClassVar[bool] = True

    def __init__(
        self,
        base: str,
        *,
        window: int,
        sinks: int,
        adapter: str | None = None,
        dtype: Any = None,
        device: Any = None,
        yarn: float | None = None,
        store: Stored | None = None,
    ) -> None:
        self.window, self.sinks, self.adapter, self.yarn, self.store = window, sinks, adapter, yarn, store
        self.tokenizer: Any = load_tokenizer(base)
        self.model: PreTrainedModel = load_base(base, dtype=dtype, device=device)
        self.check(self.model.config, 1, window=window, sinks=sinks, adapter=adapter, yarn=yarn, store=store)
        self.prepare()
        self.shape = Shape.from_config(self.model.config)
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = {end for end in [*ends, self.tokenizer.eos_token_id] if end is not None}

    @property
    def context(self) -> int | None:
        return None

    @property
    def lossless(self) -> int | None:
        return self.window + self.sinks if self.uses_window else None

    @classmethod
    def check(
        cls,
        base: Any,
        longest: int,
        *,
        window: int,
        sinks: int,
        adapter: str | None = None,
        yarn: float | None = None,
        store: Stored | None = None,
    ) -> None:
        """Whether a base of this transformers config can take `longest` tokens, prompt and answer; no weights needed.

        Raises:
            ConfigError: it cannot, or `adapter` is missing.
            AdapterError: `adapter` cannot be read, or was trained on another base.
        """
        if cls.needs_adapter and adapter is None:
            raise ConfigError(f"policy {cls.name} needs an adapter: the memory itself, or the one whose size it takes")
        if adapter is not None:
            check_shape(trained(adapter), base_shape(base))
        if cls.uses_window:
            text = base.get_text_config()
            check_fits(exact_part(window, sinks, adapter), text, text.num_hidden_layers)

    @classmethod
    def settings(
        cls,
        *,
        window: int,
        sinks: int,
        adapter: str | None = None,
        yarn: float | None = None,
        store: Stored | None = None,
    ) -> dict[str, Any]:
        """What its numbers depend on besides the base: results are kept apart by these."""
        if not cls.uses_window:
            return {}
        exact = exact_part(window, sinks, adapter)
        return {
            "window": window,
            "sinks": sinks,
            "sink_positions": exact.sink_positions,
            "layers": None if exact.layers is None else list(exact.layers),
        }

    def prepare(self) -> None:
        """Make of the plain `self.model` what this policy needs."""
        raise NotImplementedError

    def cache(self) -> Any:
        """An empty cache."""
        return AHNCache(self.model)

    def fork(self, cache: Any) -> Any:
        """An independent copy."""
        return cache.fork()

    @torch.no_grad()
    def generate(
        self, ids: list[int], max_new_tokens: int, stop: Callable[[list[int]], bool] | None = None
    ) -> list[int]:
        """The likeliest tokens after `ids`, without the one that ends them: plain argmax, whatever sampling, penalties
        or temperature the base's own generation settings ask for.

        Args:
            stop: given the answer so far after each token; true ends it.
        """
        model, cache = self.model, self.cache()
        hidden = read_chunks(model.get_decoder(), self._tensor(ids), cache, CHUNK)
        answer: list[int] = []
        while True:
            token = int(model.get_output_embeddings()(hidden).argmax(-1))
            if token in self.ends:
                return answer
            answer.append(token)
            if len(answer) >= max_new_tokens or (stop is not None and stop(answer)):
                return answer
            hidden = read_chunks(model.get_decoder(), self._tensor([token]), cache, 1)

    def losses(self, ids: list[int]) -> Tensor:
        """Next-token loss in nats at each position but the last, float32 [T - 1] on the CPU."""
        return self.scored(ids, self.cache())[0]

    @torch.no_grad()
    def scored(self, ids: list[int], cache: Any) -> tuple[Tensor, Tensor]:
        """`losses` after what `cache` has seen, which is changed, and whether each token was the likeliest, bool
        [T - 1]. The last token is not read."""
        decoder, head = self.model.get_decoder(), self.model.get_output_embeddings()
        tokens = self._tensor(ids)
        losses, likeliest = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)]
        for low in range(0, len(ids) - 1, CHUNK):
            wanted = tokens[0, low + 1 : low + CHUNK + 1]
            piece = tokens[:, low : low + len(wanted)]
            logits = head(decoder(piece, past_key_values=cache, use_cache=True).last_hidden_state[0]).float()
            losses.append(cross_entropy(logits, wanted, reduction="none").cpu())
            likeliest.append((logits.argmax(-1) == wanted).cpu())
        return torch.cat(losses), torch.cat(likeliest)

    def read(self, ids: list[int]) -> Any:
        """A cache that has seen `ids`, which may be none."""
        cache = self.cache()
        if ids:
            read_chunks(self.model.get_decoder(), self._tensor(ids), cache, CHUNK)
        return cache

    def cache_bytes(self, tokens: int) -> int:
        """Bytes held after reading `tokens` tokens of one sequence."""
        size, element = self.shape, self.model.dtype.itemsize
        found = 0
        for layer in layers_of(self.model):
            kept = min(tokens, layer.lossless)
            found += kept * (2 * size.M * size.H + layer.gate_width) * element + layer.store_bytes
            found += 4 * size.N * size.H**2 if layer.cell is not None else 0  # the state is float32
        return found

    def flops(self, tokens: int) -> tuple[int, int]:
        """FLOPs of reading `tokens` tokens: of token mixing, and of the whole model (`ahn.cost`)."""
        raise NotImplementedError

    @property
    def parameters_added(self) -> int:
        return 0

    def _tensor(self, ids: list[int]) -> Tensor:
        if not ids:
            raise ConfigError("no tokens: expected at least one")
        return torch.tensor([ids], device=self.model.device)


@lru_cache
def trained(adapter: str) -> Adapter:
    """The adapter, read once. Raises AdapterError."""
    return read_adapter(adapter)


@lru_cache
def digest(adapter: str) -> str:
    """Identifies the weights of an adapter, whatever its folder is called."""
    found = hashlib.sha256()
    for name, tensor in sorted(trained(adapter).tensors.items()):
        found.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def exact_part(window: int, sinks: int, adapter: str | None) -> AHNConfig:
    """Sinks and window without a memory, in the layers and at the distances of `adapter`."""
    if adapter is None:
        return AHNConfig(None, window, sinks)
    config = trained(adapter).config
    return AHNConfig(None, window, sinks, layers=config.layers, sink_positions=config.sink_positions)


def memory_bytes(cell: str, shape: Shape, lossless: int, element: int) -> int:
    """What a cell holds of one layer besides keys and values: its state, and the gates of the lossless tokens."""
    return 4 * shape.N * shape.H**2 + cells.get(cell).num_gates * shape.N * lossless * element


def exact_sizes(base: Any, adapter: str | None, lossless: int | None, sinks: int | None) -> tuple[int, int]:
    """Window and sinks: as asked for, else the adapter's, else what suits a base of this transformers config.

    Raises:
        ConfigError: no room is left for a window.
    """
    text = base.get_text_config()
    default = default_config(text, None)
    if adapter is not None and trained(adapter).config.lossless <= text.max_position_embeddings:
        default = trained(adapter).config
    lossless = lossless or default.lossless
    sinks = min(default.sinks, lossless // 8) if sinks is None else sinks
    if sinks >= lossless:
        raise ConfigError(f"{lossless} lossless tokens with {sinks} sinks: expected room for a window")
    return lossless - sinks, sinks
