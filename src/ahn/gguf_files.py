"""Converts GGUF files to model folders that transformers loads, once each, and keeps these in the cache folder."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ahn.errors import BaseModelError
from ahn.files import scratch
from ahn.hub import cache_folder
from ahn.quiet import quiet
from ahn.room import shortage

logger = logging.getLogger(__name__)

_CONVERSION = b"1"  # part of each converted folder's name; raise it when the conversion changes


def is_model_folder(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def check_complete(base: str | os.PathLike[str], missing: set[str]) -> None:
    """Raises BaseModelError if weights are missing."""
    if missing:
        raise BaseModelError(f"{os.fspath(base)} lacks {len(missing)} weights, such as {min(missing)}")


def converted_folder(gguf: Path) -> Path:
    """The folder of a converted file, named after the file's size and samples of its content.

    A hash of all its gigabytes would slow down every later load.
    """
    digest = hashlib.sha256(_CONVERSION)
    samples, block = 16, 1 << 16
    with gguf.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        digest.update(str(size).encode())
        for i in range(samples):
            file.seek(max(0, size - block) * i // (samples - 1))
            digest.update(file.read(block))
    return cache_folder() / "bases" / f"{gguf.stem}-{digest.hexdigest()[:12]}"


def converted(gguf: Path) -> Path:
    """The transformers folder of a GGUF file, converted now if it is not in the cache. Raises BaseModelError."""
    folder = converted_folder(gguf)
    if is_model_folder(folder):
        return folder
    size, needed = gguf.stat().st_size, _converted_size(gguf)
    try:
        with scratch(folder.parent) as unfinished:
            free = shutil.disk_usage(folder.parent).free
            if free < needed:
                raise OSError(f"{_mb(needed)} needed, {_mb(free)} free")
            if lack := shortage(memory=needed):
                raise BaseModelError(f"converting {gguf}: {lack}; expected more memory, or a smaller base")
            logger.info(
                "converting %s once into %s: %s become %s, of disk and, meanwhile, of memory",
                gguf, folder, _mb(size), _mb(needed),
            )  # fmt: skip
            _convert(gguf, unfinished / "base")
            _move(unfinished / "base", folder)
    except OSError as error:
        raise BaseModelError(
            f"cannot write the converted {gguf.name} into {folder.parent}: {error}; AHN_CACHE can name another folder"
        ) from error
    return folder


def _move(source: Path, folder: Path) -> None:
    try:
        source.rename(folder)
    except OSError:
        if not is_model_folder(folder):  # if it is one, another process was faster, with the same result
            raise


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model, info = from_gguf(
        AutoModelForCausalLM,
        gguf,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    check_complete(gguf, info["missing_keys"])
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise BaseModelError(f"{gguf} is damaged: {name} holds numbers that are not finite")
    tokenizer = from_gguf(AutoTokenizer, gguf)
    for role in ("bos", "eos", "pad", "unk"):  # transformers 5.17 gets these wrong, though its config is right
        if (token_id := getattr(model.config, f"{role}_token_id", None)) is not None:
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(token_id))
    _split_digits(tokenizer)

    try:
        with quiet():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except Exception as error:  # safetensors and tokenizers each have their own type for a failed write
        raise OSError(str(error)) from error


def from_gguf(auto: Any, gguf: Path, **options: Any) -> Any:
    """`auto.from_pretrained` of a GGUF file. Raises BaseModelError."""
    _check_gguf(gguf)
    # linked into an empty folder: transformers would prefer a tokenizer.json or config.json beside the file
    with tempfile.TemporaryDirectory() as alone, quiet():
        link = Path(alone) / "model.gguf"
        try:
            link.symlink_to(gguf.resolve())
        except OSError:  # Windows without the right to make links
            link = gguf
        try:
            return auto.from_pretrained(link.parent, gguf_file=link.name, **options)
        except Exception as error:  # the parsers index straight into the file's bytes and can raise anything
            raise BaseModelError(_gguf_defect(gguf) or f"cannot read {gguf}: {error}") from error


def _check_gguf(gguf: Path) -> None:
    with gguf.open("rb") as file:
        if (start := file.read(4)) != b"GGUF":
            raise BaseModelError(f"{gguf} is no GGUF file: it starts with {start!r} instead of b'GGUF'")


def _gguf_defect(gguf: Path) -> str | None:
    """The defect of the file itself, in words. None if it can be parsed to its end; its architecture may be unknown."""
    try:
        _converted_size(gguf)
    except BaseModelError as error:
        return str(error)
    return None


def _converted_size(gguf: Path) -> int:
    """Bytes of the file's weights in float32. Raises BaseModelError if the file cannot be parsed to its end."""
    from gguf import GGUFReader

    _check_gguf(gguf)
    try:
        reader = GGUFReader(gguf)
        size = 4 * sum(int(tensor.n_elements) for tensor in reader.tensors)
        kind = field.contents() if (field := reader.get_field("general.architecture")) else None
    except Exception as error:  # the parser indexes straight into the file's bytes
        raise BaseModelError(f"cannot read {gguf}: the file is damaged or cut short ({error})") from error
    if not size:  # transformers would fill a model of its default size with random numbers
        raise BaseModelError(f"cannot read {gguf}: no weights of its architecture ({kind}) are in it")
    return size


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _split_digits(tokenizer: Any) -> None:
    """Restore the pre-tokenizer that splits digits (SmolLM2 has it), which transformers does not read from a GGUF.

    A vocabulary in which no token joins a digit to another character shows that it is needed. Without it, spaces before
    a digit would be cut differently than in training.
    """
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    joined = re.compile(r"[0-9].|.[0-9]", re.DOTALL)
    ordinary = set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab())
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and not any(map(joined.search, ordinary)):
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )
