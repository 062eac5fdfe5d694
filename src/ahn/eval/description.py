"""The configuration that is written beside the results of a task, a length and a policy."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahn.config import AHNConfig
from ahn.cost import cost
from ahn.errors import AHNError, ConfigError
from ahn.eval import results
from ahn.eval.options import Options
from ahn.eval.work import Work
from ahn.fingerprint import sampled
from ahn.version import __version__

if TYPE_CHECKING:
    from ahn.eval.policies.base import Policy


def model_of(options: Options, config: Any) -> dict[str, Any]:
    """The keys that identify the model, independent of the folder that it lies in."""
    import torch

    path = Path(options.base)
    sizes = config.to_dict()
    sizes.pop("_name_or_path", None), sizes.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(sizes, sort_keys=True, default=str).encode()).hexdigest()[:10]
    cuda = torch.cuda.is_available() if options.device is None else options.device.startswith("cuda")
    return {
        "base": path.resolve().name if path.exists() else options.base,
        "base_config": digest,
        "dtype": options.dtype or ("bfloat16" if cuda else "float32"),
        "seed": options.seed,
    }


def describe(
    policy: Policy, work: Work, identifying: dict[str, Any], folder: Path, options: Options, weights: str
) -> None:
    """Write the configuration of results into their folder, or add the present environment to the one that is there.

    Args:
        identifying: the keys by which results are kept apart.
        weights: `fingerprint` of the policy's model.

    Raises:
        ConfigError: the results there are of a model with other weights.
    """
    tokens = work.length or work.mean
    mixing, model = policy.flops(tokens)
    full = cost(policy.shape, tokens, AHNConfig(None))
    made_with = {"package": __version__, **results.environment()}
    config = {
        "version": results.VERSION,
        **identifying,
        "suite": work.task.suite,
        "kind": work.task.kind,
        "window": policy.kept.window if policy.uses_window else None,
        "sinks": policy.kept.sinks if policy.uses_window else None,
        "share": options.share if policy.uses_window else None,
        "adapter": None if options.adapter is None else Path(options.adapter).name,
        "data": work.data,
        "limit": options.limit,
        "fingerprint": weights,
        "cost": {
            "tokens": tokens,
            "cache_bytes": policy.cache_bytes(tokens),
            "mixing_flops": mixing,
            "model_flops": model,
            "parameters_added": policy.parameters_added,
            "full_cache_bytes": policy.shape.kv_elements(tokens) * policy.model.dtype.itemsize,
            "full_mixing_flops": full.mixing.full,
            "full_model_flops": full.flops.full,
        },
        "made_with": [made_with],
    }
    if (folder / results.CONFIG).is_file():
        before = results.load(folder).config
        if before["fingerprint"] not in (weights, sampled(policy.model)):
            raise ConfigError(f"{folder}: results of a model with other weights: choose another output folder")
        config["made_with"] = [*(made for made in before["made_with"] if made != made_with), made_with]
    results.write_config(folder, config)


def check_budgets(held: dict[str, int]) -> None:
    """Check that no baseline with a bounded cache holds more bytes than the memory that it is compared with.

    Args:
        held: bytes of each policy.

    Raises:
        AHNError: a baseline does.
    """
    memory = held.get("ahn")
    for name, size in held.items():
        if memory is not None and name != "full" and size > memory:
            raise AHNError(
                f"policy {name} holds {size:,} bytes, more than the {memory:,} of the memory: not comparable"
            )
