"""The model `ahn` of EleutherAI's lm-evaluation-harness: every task it has, with any policy of this package.

  lm_eval run --model ahn --model_args base=B,adapter=A,lossless=2048 --tasks hellaswag
  python -m ahn.eval.harness run --model ahn ...         the same, with an lm_eval that does not look for plugins

lm_eval finds models of other packages through the entry point "lm_eval.models", which this package has. That is in its
main branch since August 2026, but not in a release up to 0.4.13; for these, the second line registers the model first.
One process, one text at a time: texts are as long as they are, and what is compared is the cache.
"""

from __future__ import annotations

import sys
from itertools import groupby
from typing import Any

import torch
from tqdm import tqdm

from ahn.bases import base_config
from ahn.errors import AHNError, ConfigError, UnsupportedOperationError
from ahn.eval import policies
from ahn.eval.policies.base import exact_sizes

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError:
    if __name__ != "__main__":
        raise
    print("ahn.eval.harness: error: lm_eval is not installed: pip install 'ahn[harness]'", file=sys.stderr)
    raise SystemExit(2) from None

MAX_NEW_TOKENS = 256  # lm_eval's own default


@register_model("ahn")
class AhnLM(TemplateLM):
    """A policy as lm_eval asks it.

    Args:
        base: hub id, folder, GGUF file, or "smollm2-135m".
        adapter: the trained memory. policy: default "ahn" with an adapter, else "window".
        lossless: tokens kept exactly, `sinks` of them the first ones; default: the adapter's.
        dtype, device, yarn: see `policies.base.Policy`.
        batch_size, max_batch_size: what lm_eval passes; texts are read one by one.

    Raises:
        AHNError: see `policies.base.Policy`.
    """

    def __init__(
        self,
        base: str = "smollm2-135m",
        adapter: str | None = None,
        policy: str | None = None,
        lossless: int | None = None,
        sinks: int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        yarn: float | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            device = None  # lm_eval asks for "cuda:0" where nobody said anything
        cls = policies.get(policy or ("ahn" if adapter else "window"))
        config = base_config(base)
        window, sinks = exact_sizes(config, adapter, lossless, sinks)
        cls.check(config, 1, window=window, sinks=sinks, adapter=adapter, yarn=yarn)
        self.policy = cls(base, window=window, sinks=sinks, adapter=adapter, dtype=dtype, device=device, yarn=yarn)
        self.tokenizer: Any = self.policy.tokenizer

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text whose first token is scored too."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False).input_ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what would be generated. A context that several
        continuations in a row share is read once."""
        found: list[tuple[float, bool]] = []
        with tqdm(total=len(requests), disable=disable_tqdm or None, desc="loglikelihood") as bar:
            for _, group in groupby(requests, key=lambda request: request[1]):
                alike = list(group)
                context = self._fitting(alike[0][1], max(len(continuation) for *_, continuation in alike))
                cache = self.policy.read(context[:-1])
                for texts, _, continuation in alike:
                    text = [context[-1], *continuation]
                    ((losses, likeliest),) = self.policy.scored([text], self.policy.fork(cache))
                    answer = -losses.double().sum().item(), bool(likeliest.all())
                    self.cache_hook.add_partial("loglikelihood", texts, answer)
                    found.append(answer)
                    bar.update()
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts: in one go by policies that read any length, else window by window as
        lm_eval's other models do."""
        found = []
        for request in tqdm(requests, disable=disable_tqdm or None, desc="loglikelihood_rolling"):
            (text,) = request.args
            ids = self.tok_encode(text)
            longest = self.policy.context or len(ids)
            windows = map(make_disjoint_window, get_rolling_token_windows(ids, self.prefix_token_id, longest, 1))
            total = 0.0
            for context, wanted in windows:
                (losses,) = self.policy.losses([context + wanted])
                total -= losses[-len(wanted) :].double().sum().item()
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            found.append(total)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, up to the first of the strings that end them. Raises UnsupportedOperationError for
        sampling."""
        found = []
        for request in tqdm(requests, disable=disable_tqdm or None, desc="generate_until"):
            text, settings = request.args
            if settings.get("do_sample"):
                raise UnsupportedOperationError("do_sample: the policies decode greedily")
            ends = settings.get("until") or []
            ends = [end for end in ([ends] if isinstance(ends, str) else ends) if end]
            names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
            limit = next((settings[name] for name in names if settings.get(name)), MAX_NEW_TOKENS)
            prompt = self._fitting(self.tok_encode(text), limit)
            answer = self.policy.generate(prompt, limit, lambda ids, ends=ends: bool(self._cut(ids, ends)[1]))  # type: ignore[misc]
            said, _ = self._cut(answer, ends)
            self.cache_hook.add_partial("generate_until", request.args, said)
            found.append(said)
        return found

    def _cut(self, ids: list[int], ends: list[str]) -> tuple[str, bool]:
        """The text before the first of `ends`, and whether there is one."""
        said = self.tokenizer.decode(ids, skip_special_tokens=True)
        places = [place for end in ends if (place := said.find(end)) >= 0]
        return (said[: min(places)], True) if places else (said, False)

    def _fitting(self, ids: list[int], more: int) -> list[int]:
        """`ids` without their first ones, where a policy cannot take all of them and `more`."""
        if self.policy.context is None or len(ids) + more <= self.policy.context:
            return ids
        if more >= self.policy.context:
            raise ConfigError(f"{more} tokens: policy {self.policy.name} takes at most {self.policy.context}")
        return ids[more - self.policy.context :]


def main() -> None:
    """lm_eval's command line, with `ahn` among its models."""
    import lm_eval.models  # noqa: F401 - its own: it looks for them only while none are registered
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except AHNError as error:
        print(f"lm_eval: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
