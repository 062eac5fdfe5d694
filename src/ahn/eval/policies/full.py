"""Full attention: the base as it is, or with its positions extended by YaRN."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from transformers.cache_utils import DynamicCache

from ahn.config import AHNConfig
from ahn.cost import cost
from ahn.errors import ConfigError
from ahn.eval.kept import Kept
from ahn.eval.policies.base import Policy
from ahn.ops.rotary import CHANGING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Full(Policy):
    """Full attention: the base through transformers' own attention and cache.

    With `yarn`, the rotary frequencies are stretched by that factor (YaRN, arXiv 2309.00071, as in transformers)
    whatever the length of the text, so that the base has that many times its positions.
    """

    name = "full"
    uses_window = False
    keeps_padding = True

    @classmethod
    def check(cls, base: Any, longest: int, kept: Kept) -> None:
        super().check(base, longest, kept)
        yarn = kept.yarn
        if yarn is not None:
            kind = _rope(base).get("rope_type", "default")
            if kind != "default":
                raise ConfigError(f"yarn={yarn:g}: this base already scales its positions ({kind})")
        short = _rope(base).get("original_max_position_embeddings")
        if _rope(base).get("rope_type") in CHANGING and short is not None and longest > short:
            raise ConfigError(
                f"policy full: {longest:,} tokens of prompt and answer, but this base changes its positions "
                f"from {short:,} on, so it cannot read in chunks: leave `full` out, or choose a smaller length"
            )
        positions = int(base.get_text_config().max_position_embeddings * (yarn or 1))
        if longest > positions:
            more = longest / base.get_text_config().max_position_embeddings
            raise ConfigError(
                f"policy full: {longest:,} tokens of prompt and answer, but the base has {positions:,} positions: "
                f"leave `full` out, choose a smaller length, or extend them with --yarn {-(-more // 0.5) / 2:g}"
            )

    @classmethod
    def settings(cls, kept: Kept) -> dict[str, Any]:
        return {} if kept.yarn is None else {"yarn": kept.yarn}

    @property
    def context(self) -> int | None:
        return self.model.config.get_text_config().max_position_embeddings

    def prepare(self) -> None:
        self.model.requires_grad_(False)
        config, decoder = self.model.config.get_text_config(), self.model.get_decoder()
        positions = config.max_position_embeddings
        self.plain = positions, config.rope_parameters, decoder.rotary_emb
        yarn = self.kept.yarn
        if yarn is None:
            return
        scaling = {"rope_type": "yarn", "factor": yarn, "original_max_position_embeddings": positions}
        config.rope_parameters = _rope(config) | scaling
        config.max_position_embeddings = int(positions * yarn)
        decoder.rotary_emb = type(decoder.rotary_emb)(config=config).to(self.model.device)

    def release(self) -> PreTrainedModel:
        config, decoder = self.model.config.get_text_config(), self.model.get_decoder()
        config.max_position_embeddings, config.rope_parameters, decoder.rotary_emb = self.plain
        return self.model

    def cache(self) -> Any:
        return DynamicCache(config=self.model.config)

    def fork(self, cache: Any) -> Any:
        return copy.deepcopy(cache)

    def cache_bytes(self, tokens: int) -> int:
        return self.shape.kv_elements(tokens) * self.model.dtype.itemsize

    def flops(self, tokens: int) -> tuple[int, int]:
        found = cost(self.shape, tokens, AHNConfig(None))
        return found.mixing.full, found.flops.full


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config.get_text_config(), "rope_parameters", None) or {})
