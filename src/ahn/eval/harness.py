"""The model `ahn` of EleutherAI's lm-evaluation-harness: runs its tasks with any policy of this package.

  lm_eval run --model ahn --model_args base=B,adapter=A,lossless=2048 --tasks hellaswag
  python -m ahn.eval.harness run --model ahn ...         the same, with an lm_eval that does not look for plugins

lm_eval finds models of other packages through the entry point "lm_eval.models", which this package has. Its main branch
looks there since August 2026, its releases up to 0.4.13 do not. For these, the second line registers the model first.
There is one process, and it reads one text at a time, whole: the comparison is of caches, not of speed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

import torch
from tqdm import tqdm

from ahn.bases import base_config
from ahn.errors import AHNError, ConfigError, UnsupportedOperationError
from ahn.eval import policies
from ahn.eval.kept import Kept, exact_sizes
from ahn.registry import did_you_mean

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
except ModuleNotFoundError:
    if __name__ != "__main__":
        raise
    print("ahn.eval.harness: error: lm_eval is not installed: pip install 'ahn[harness]'", file=sys.stderr)
    raise SystemExit(2) from None

MAX_NEW_TOKENS = 256  # lm_eval's own default


@dataclass(frozen=True)
class Arguments:
    """The model arguments that lm_eval accepts for `ahn`.

    Args:
        base: hub id, folder, GGUF file, or "smollm2-135m".
        adapter: the trained memory.
        policy: name of a policy; default: "ahn" with an adapter, else "window".
        lossless: tokens kept exactly, of which `sinks` are the first ones; default: the adapter's.
        dtype, device: see `policies.base.Policy`. yarn: see `Kept`.
        batch_size, max_batch_size: accepted because lm_eval passes them, and ignored.
    """

    base: str = "smollm2-135m"
    adapter: str | None = None
    policy: str | None = None
    lossless: int | None = None
    sinks: int | None = None
    dtype: str | None = None
    device: str | None = None
    yarn: float | None = None
    batch_size: Any = None
    max_batch_size: Any = None


@register_model("ahn")
class AhnLM(TemplateLM):
    """Makes a policy answer the requests of lm_eval.

    Raises:
        AHNError: see `policies.base.Policy`.
    """

    def __init__(self, arguments: Arguments) -> None:
        super().__init__()
        base, adapter, device = arguments.base, arguments.adapter, arguments.device
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            device = None  # lm_eval asks for "cuda:0" where the user named no device
        cls = policies.get(arguments.policy or ("ahn" if adapter else "window"))
        config = base_config(base)
        kept = Kept(*exact_sizes(config, adapter, arguments.lossless, arguments.sinks), adapter, arguments.yarn)
        cls.check(config, 1, kept)
        self.policy = cls(base, kept, dtype=arguments.dtype, device=device)
        self.tokenizer: Any = self.policy.tokenizer

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> AhnLM:
        """The model for arguments as a dictionary. Raises ConfigError for a name that is not in `Arguments`."""
        given = arg_dict | {key: value for key, value in (additional_config or {}).items() if value is not None}
        known = [field.name for field in fields(Arguments)]
        for name in given:
            if name not in known:
                raise ConfigError(f"unknown model argument {name!r}: {did_you_mean(name, known)}")
        return cls(Arguments(**given))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> AhnLM:
        """`create_from_arg_obj` for arguments as "name=value,name=value"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text whose first token is scored too."""
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
        """Log-likelihood of each continuation, and whether greedy decoding would generate it. A context that several
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
        """Log-likelihood of whole texts. Policies that read any length read a text in one piece, the others window by
        window as lm_eval's own models do."""
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
        """`ids`, cut at the front so that they and `more` tokens fit into the policy's context."""
        if self.policy.context is None or len(ids) + more <= self.policy.context:
            return ids
        if more >= self.policy.context:
            raise ConfigError(f"{more} tokens: policy {self.policy.name} takes at most {self.policy.context}")
        return ids[more - self.policy.context :]


def main() -> None:
    """lm_eval's command line, with `ahn` among its models."""
    import lm_eval.models  # noqa: F401 - lm_eval registers its own models only while none are registered
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except AHNError as error:
        print(f"lm_eval: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
