"""The base of all policies. A policy is a base model that reads a prompt in its own way and answers greedily.

A policy is one file of this folder with one class, found under the file's name (`ahn_zeroed.py` is `ahn-zeroed`).
All policies read in chunks through a cache. So memory use is that of the cache, and caches alone are compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ahn.adapter_files import base_shape, check_shape
from ahn.bases import load_base, load_tokenizer
from ahn.compat import PAST
from ahn.cost import Shape, cost, held_bytes
from ahn.engine.generate import end_tokens
from ahn.engine.prefill import CHUNK, GPU_CHUNK
from ahn.errors import ConfigError
from ahn.eval.kept import Kept, exact_part, trained
from ahn.hf.architecture import check_fits
from ahn.hf.augment import detach
from ahn.memory.cache import AHNCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ahn.eval.prompts import Prompt
    from ahn.eval.tasks.base import Example


class Policy:
    """A base model with one way to remember. Several texts can be read at once, as rows of a batch of any lengths.

    Letters: B rows, T tokens, D hidden size.

    Args:
        base: hub id, folder, GGUF file, or "smollm2-135m".
        kept: the parts of a text that it keeps.
        dtype: default float32 on a CPU, bfloat16 on CUDA. device: default CUDA if there is one.
        model: the plain base, if it is loaded already; it is changed in place until `release`.

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
    uses_store: ClassVar[bool] = False
    recalls: ClassVar[bool] = False  # reads the text before the question, wherever the two are known
    finds: ClassVar[bool] = False  # finds passages as `kept.recall` says
    keeps_padding: ClassVar[bool] = False  # padding stays in the cache and must be masked in every call

    def __init__(
        self, base: str, kept: Kept, *, dtype: Any = None, device: Any = None, model: PreTrainedModel | None = None
    ) -> None:
        self.kept = kept
        self._read: tuple[Sequence[int], Any] | None = None  # the last text that was asked about, and its cache
        self.tokenizer: Any = _tokenizer(base)
        self.model: PreTrainedModel = load_base(base, dtype=dtype, device=device) if model is None else model
        self.check(self.model.config, 1, kept)
        self.prepare()
        self.shape = Shape.from_config(self.model.config)
        self.ends = end_tokens(self.model, self.tokenizer)

    @property
    def context(self) -> int | None:
        return None

    @property
    def lossless(self) -> int | None:
        return self.kept.window + self.kept.sinks if self.uses_window else None

    @classmethod
    def check(cls, base: Any, longest: int, kept: Kept) -> None:
        """Check that a base of this transformers config can take `longest` tokens, prompt and answer. Needs no weights.

        Raises:
            ConfigError: it cannot, or `kept.adapter` is missing.
            AdapterError: the adapter cannot be read, or was trained on another base.
        """
        if cls.needs_adapter and kept.adapter is None:
            raise ConfigError(f"policy {cls.name} needs an adapter: the memory itself, or the one whose size it takes")
        if kept.yarn is not None and not 1 <= kept.yarn < math.inf:
            raise ConfigError(f"yarn={kept.yarn:g}: expected a factor of at least 1")
        if kept.adapter is not None:
            check_shape(trained(kept.adapter), base_shape(base))
        if cls.uses_window:
            text = base.get_text_config()
            exact = exact_part(kept)
            check_fits(exact, text, text.num_hidden_layers)
            if cls.uses_store and kept.store is not None:
                kept.store.fill(exact)

    @classmethod
    def settings(cls, kept: Kept) -> dict[str, Any]:
        """The settings that its numbers depend on, besides the base. Results are kept apart by these."""
        if not cls.uses_window:
            return {}
        exact = exact_part(kept)
        return {
            "window": kept.window,
            "sinks": kept.sinks,
            "sink_positions": exact.sink_positions,
            "layers": None if exact.layers is None else list(exact.layers),
        }

    def prepare(self) -> None:
        """Change the plain `self.model` as this policy needs it."""
        raise NotImplementedError

    def release(self) -> PreTrainedModel:
        """The plain base again, for the next policy. This policy cannot be used any more."""
        return detach(self.model)

    def cache(self) -> Any:
        """An empty cache."""
        return AHNCache(self.model)

    def fork(self, cache: Any) -> Any:
        """An independent copy."""
        return cache.fork()

    def generate(
        self, ids: Sequence[int], max_new_tokens: int, stop: Callable[[list[int]], bool] | None = None
    ) -> list[int]:
        """`answers` to one prompt."""
        return self.answers([ids], [max_new_tokens], stop)[0]

    @torch.no_grad()
    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        stop: Callable[[list[int]], bool] | None = None,
    ) -> list[list[int]]:
        """Greedy answers, each at most as long as its limit and without the token that ends it. Sampling, penalties and
        temperature in the base's generation settings are ignored.

        Args:
            stop: given an answer so far after each token; true ends it.
        """
        head, cache = self.model.get_output_embeddings(), self.cache()
        ids, padding = self._rows(prompts)
        for piece in ids.split(CHUNK, 1):
            hidden = self._next(piece, cache, padding)
        found: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(found)))
        while True:
            tokens = head(hidden[:, -1]).argmax(-1)
            for row, token in enumerate(tokens.tolist()):
                if row not in going:
                    continue
                if token not in self.ends:
                    found[row].append(token)
                if token in self.ends or len(found[row]) >= limits[row] or (stop is not None and stop(found[row])):
                    going.remove(row)
            if not going:
                return found
            hidden = self._next(tokens[:, None], cache, padding)

    def asked(self, questions: Sequence[tuple[Prompt, Example]]) -> list[tuple[list[int], dict[str, Any]]]:
        """Answers to questions on one text, as from `answers`, each with further entries for its row. The text is read
        once."""
        prompts = [prompt for prompt, _ in questions]
        rows = [prompt.ids[prompt.asks :] for prompt in prompts]
        limits = [example.max_new_tokens for _, example in questions]
        return [(answer, {}) for answer in self.after(self.fork(self.document(prompts[0])), rows, limits)]

    def document(self, prompt: Prompt) -> Any:
        """A cache that has read the text of a prompt and nothing of the question. It must not be changed."""
        ids = prompt.text
        if self._read is None or self._read[0] != ids:
            self._read = None  # frees its memory before another text is read
            self._read = ids, self.read(ids, self.text_cache())
        return self._read[1]

    @torch.no_grad()
    def after(self, cache: Any, rows: Sequence[Sequence[int]], limits: Sequence[int]) -> list[list[int]]:
        """`answers` to questions on the text that `cache` has read, one question a row. The cache is changed."""
        hidden, read = self._follow(cache, rows)
        ended = torch.tensor(sorted(self.ends), device=self.model.device)
        tokens: list[Tensor] = []
        while True:
            tokens.append(self.model.get_output_embeddings()(hidden).argmax(-1, keepdim=True))
            # asked only every eighth token, because it makes a GPU wait
            done = len(tokens) % 8 == 0 and bool(torch.isin(torch.cat(tokens, 1), ended).any(1).all())
            if done or len(tokens) == max(limits):
                break
            hidden = read(tokens[-1])
        found = []
        for row, limit in zip(torch.cat(tokens, 1).tolist(), limits, strict=True):
            stop = next((i for i, token in enumerate(row) if token in self.ends), len(row))
            found.append(row[: min(stop, limit)])
        return found

    @torch.no_grad()
    def logits_after(self, cache: Any, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits [B, V] of the token behind each row, as `after` reads them."""
        found: Tensor = self.model.get_output_embeddings()(self._follow(cache, rows)[0])
        return found

    def _follow(self, cache: Any, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The last hidden state [B, D] of each row behind one text, and a function that reads a further token [B, 1] of
        each row and returns the next state."""
        past, device = cache.get_seq_length(), self.model.device
        if past and len(rows) > 1:
            cache.batch_repeat_interleave(len(rows))
        ids, padding = self._rows(rows)
        free = torch.tensor(padding or [0] * len(rows), device=device)[:, None]
        places = torch.arange(ids.shape[1], device=device)
        real = torch.cat([torch.ones(len(rows), past, dtype=torch.long, device=device), (places >= free).long()], 1)
        positions = past + (places - free).clamp(min=0)

        def read(new: Tensor, at: Tensor, mask: Tensor | None) -> Tensor:
            options = {} if mask is None else {"attention_mask": mask}
            found = self.model.get_decoder()(new, **{PAST: cache}, use_cache=True, position_ids=at, **options)
            return found.last_hidden_state[:, -1]

        def further(tokens: Tensor) -> Tensor:
            nonlocal real, positions
            real = torch.cat([real, torch.ones_like(real[:, :1])], 1)
            positions = positions[:, -1:] + 1
            return read(tokens, positions, real if padding and self.keeps_padding else None)

        return read(ids, positions, real if padding else None), further

    def losses(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """The next-token losses of each text in nats, at each position but the last, float32 [T - 1] on the CPU."""
        return [losses for losses, _ in self.scored(texts, self.cache())]

    @torch.no_grad()
    def scored(self, texts: Sequence[Sequence[int]], cache: Any) -> list[tuple[Tensor, Tensor]]:
        """`losses` behind the text that `cache` has read, and whether each token was the likeliest, bool [T - 1]. The
        cache is changed. The last token is not read."""
        head = self.model.get_output_embeddings()
        ids, padding = self._rows(texts)
        parts: list[list[tuple[Tensor, Tensor]]] = [[(torch.zeros(0), torch.zeros(0, dtype=torch.bool))] for _ in texts]
        wanted = ids[:, 1:].split(CHUNK, 1) if ids.shape[1] > 1 else ()
        for piece, targets in zip(ids[:, :-1].split(CHUNK, 1), wanted, strict=False):
            for row, hidden in enumerate(self._next(piece, cache, padding)):
                logits = head(hidden).float()  # row by row, because logits of a batch may be larger than the model
                losses = cross_entropy(logits, targets[row], reduction="none")
                parts[row].append((losses.cpu(), (logits.argmax(-1) == targets[row]).cpu()))
        whole = [tuple(torch.cat(column) for column in zip(*row, strict=True)) for row in parts]
        free = padding or [0] * len(whole)
        return [(losses[n:], likeliest[n:]) for (losses, likeliest), n in zip(whole, free, strict=True)]

    def text_cache(self) -> Any:
        """An empty cache for a text that questions are asked about."""
        return self.cache()

    @torch.no_grad()
    def read(self, ids: Sequence[int], cache: Any = None) -> Any:
        """A cache that has read `ids`, which may be empty. A new one is made if none is given."""
        cache = self.cache() if cache is None else cache
        chunk = CHUNK if self.model.device.type == "cpu" else GPU_CHUNK
        for piece in self._rows([ids])[0].split(chunk, 1) if ids else ():
            self._next(piece, cache, None)
        return cache

    def _rows(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, list[int] | None]:
        """Ids [B, T], and the number of padding tokens at the front of each row. None if there is no padding."""
        if not texts or not all(texts):
            raise ConfigError("no tokens: expected at least one")
        longest = max(map(len, texts))
        padding = [longest - len(text) for text in texts]
        filled = [[text[0]] * free + list(text) for text, free in zip(texts, padding, strict=True)]
        return torch.tensor(filled, device=self.model.device), padding if any(padding) else None

    def _next(self, ids: Tensor, cache: Any, padding: list[int] | None) -> Tensor:
        """Last hidden states [B, T, D] of the next tokens ids [B, T]."""
        options: dict[str, Tensor] = {}
        if padding is not None:
            seen = cache.get_seq_length()
            free = torch.tensor(padding, device=ids.device)[:, None]
            places = torch.arange(seen + ids.shape[1], device=ids.device)
            options["position_ids"] = (places[seen:] - free).clamp(min=0)
            if self.keeps_padding or seen < max(padding):
                options["attention_mask"] = (places >= free).long()
        return self.model.get_decoder()(ids, **{PAST: cache}, use_cache=True, **options).last_hidden_state

    def cache_bytes(self, tokens: int) -> int:
        """Bytes held after reading `tokens` tokens of one sequence."""
        return held_bytes(self.shape, self.model.ahn_config, tokens, self.model.dtype.itemsize)

    def flops(self, tokens: int) -> tuple[int, int]:
        """FLOPs of reading `tokens` tokens: of token mixing, and of the whole model (`ahn.cost`)."""
        found = cost(self.shape, tokens, self.model.ahn_config)
        return found.mixing.memory, found.flops.memory

    @property
    def parameters_added(self) -> int:
        return 0


@lru_cache(maxsize=2)
def _tokenizer(base: str) -> Any:
    return load_tokenizer(base)
