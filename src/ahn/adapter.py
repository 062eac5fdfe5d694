"""Models with trained memories: a base and its adapter, loaded, saved and converted."""

from __future__ import annotations

import logging
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from ahn import bases, cells, hub, quiet, stores, zoo
from ahn.adapter_files import SETTINGS, Adapter, base_shape, check_shape, first_line, read_adapter, write_adapter
from ahn.config import AHNConfig
from ahn.errors import AdapterError, BaseModelError, ConfigError
from ahn.hf.augment import augment, detach
from ahn.hf.weights import adapter_of, apply

if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.getLogger(__name__)
NONE = "none"
PAPER_LOSSLESS = 32768  # tokens kept exactly in the paper: 128 sinks + 32,640 window


def from_pretrained(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    *,
    window: int | None = None,
    sinks: int | None = None,
    cell: str | None = None,
    store: str | None = None,
    store_size: int | None = None,
    store_span: int | None = None,
    lossless: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """A base model with its memory, ready to read.

    Args:
        base: hub id, local folder, GGUF file, or "smollm2-135m".
        adapter: a shipped one's name (`ahn.zoo.names()`), a folder or a hub id, ours or the authors'; "none" for sinks
            and window alone. Default: the one in the base's own folder; else, if no `cell` is named, the shipped one
            for this base; else none.
        window, sinks: tokens kept exactly. Default: the adapter's; without one the paper's 32,640 + 128 where the
            base has that many positions, else a quarter of them.
        cell: an untrained cell by name, to be trained; with an adapter, must be the adapter's.
        store, store_size, store_span: which of the tokens that leave the window are kept exactly, how many, judged in
            spans of how many (AHNConfig, docs/store.md). None: each as in the adapter, so without one no store; "none":
            no store, whatever the adapter has.
        lossless: in place of `window`: sinks, store and window in all (`AHNConfig.with_lossless`).
        dtype: default float32 on a CPU, bfloat16 on CUDA. device: default CUDA if there is one.

    Returns:
        the frozen model in eval mode; `model.ahn_config` says what it got.

    Raises:
        BaseModelError, UnsupportedModelError, AdapterError, ConfigError.
    """
    trained, adapter = None, chosen(base, adapter, cell)
    if adapter is not None:
        trained = read_adapter(adapter)
        if cell not in (None, trained.config.cell):
            raise ConfigError(f"{{cell}}: adapter {adapter} is for {trained.config.cell!r}", cell=cell)
    if cell is not None:
        cells.check_name(cell)
    given = {"window": window, "sinks": sinks, "store": store, "store_size": store_size, "store_span": store_span}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if lossless is not None and window is not None:
        raise ConfigError("{lossless} with {window}: expected one of them", lossless=lossless, window=window)
    if store == NONE:
        changes = {"store_size": 0, "store_span": 1} | changes | {"store": None}
    # what is wrong is said before gigabytes are loaded
    wanted = _sized(trained.config if trained else AHNConfig(cell=None), changes, lossless)
    check_gates(wanted.store, trained)
    model = bases.load_base(base, dtype=dtype, device=device)
    base_config = model.config.get_text_config()
    config = _fitting(trained.config, base_config) if trained else default_config(base_config, cell)
    if window is None and lossless is None and not trained:
        changes["window"] = config.lossless - (config.sinks if sinks is None else sinks) - (store_size or 0)
    augment(model, _sized(config, changes, lossless))
    model.ahn_names["base"] = os.fspath(base)
    if trained:
        apply(trained, model)
    return model.eval()


def chosen(
    base: str | os.PathLike[str], adapter: str | os.PathLike[str] | None, cell: str | None = None
) -> str | os.PathLike[str] | None:
    """The adapter that `from_pretrained` takes, or None."""
    if adapter is None and (hub.expanded(base) / SETTINGS).is_file():
        return base
    if adapter is None and cell is None:
        return zoo.default_for(os.fspath(base)) or _recognised(base) or _on_hub(base)
    return None if adapter == NONE else adapter


def _on_hub(base: str | os.PathLike[str]) -> str | None:
    """The base's own repository, if `save_pretrained` of an augmented model put a memory there."""
    name = os.fspath(base)
    if isinstance(base, os.PathLike) or not bases.is_hub_id(name):
        return None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(name, SETTINGS, local_files_only=hub.hub_unreachable(name) is not None)
    except (EntryNotFoundError, LocalEntryNotFoundError, BaseModelError):
        return None
    except Exception as error:  # the hub client's HTTP library, and so its errors, differ between its versions
        raise AdapterError(f"{name}: whether it holds a memory cannot be asked: {first_line(error)}") from error
    return name


def _recognised(base: str | os.PathLike[str]) -> str | None:
    """The default adapter of the base that a local file or folder holds under whatever name."""
    path = hub.expanded(base)
    if not (path.suffix == ".gguf" and path.is_file()) and not (path / "config.json").is_file():
        return None
    try:
        shape = base_shape(bases.base_config(base))
    except (AttributeError, ArithmeticError, TypeError):  # no decoder of attention layers: loading it says so
        return None
    name = zoo.recognised(shape, lambda: bases.embedding_sample(base))
    if name:
        _say_recognised(os.fspath(base), name)
    return name


@cache
def _say_recognised(base: str, adapter: str) -> None:
    logger.warning("%s: weights of %s, read with its default adapter %s", base, zoo.base(adapter), adapter)


def _sized(config: AHNConfig, changes: dict[str, Any], lossless: int | None) -> AHNConfig:
    config = config.replace(**changes)
    if lossless is None:
        return config
    return config.with_lossless(lossless, changes.get("sinks"), changes.get("store_size"))


def check_gates(store: str | None, adapter: Adapter | None) -> None:
    """Raises AdapterError if this store is one that is trained, and the adapter is not for it; ConfigError if there is
    none of this name."""
    if store is None or not stores.get(store).trained or (adapter is not None and adapter.config.store == store):
        return
    what = "no adapter is given" if adapter is None else f"{adapter.source} has none"
    shipped = ", ".join(name for name in zoo.names() if zoo.store(name) == store)
    raise AdapterError(
        f"{{store}}: its gates are part of an adapter, and {what}: expected one that has them"
        f"{f', as {shipped}' if shipped else ''}, or another store",
        store=store,
    )


def default_config(base: Any, cell: str | None) -> AHNConfig:
    """Sinks and window that fit a base of this transformers config."""
    context = getattr(base, "max_position_embeddings", None) or PAPER_LOSSLESS
    lossless = PAPER_LOSSLESS if context >= PAPER_LOSSLESS else max(context // 4, 1)
    sinks = min(128, lossless // 16)
    return AHNConfig(cell, lossless - sinks, sinks)


def _fitting(config: AHNConfig, base: Any) -> AHNConfig:
    """Another base's default sizes where this one has fewer positions than the adapter suggests to keep."""
    context = getattr(base, "max_position_embeddings", None) or config.lossless
    if config.lossless <= context:
        return config
    default = default_config(base, config.cell)
    return config.replace(window=default.window, sinks=default.sinks)


def save_adapter(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Write the trained weights and settings of an augmented model's memory to `folder`.

    An adapter that is already there is replaced at once, or stays if the disk refuses.

    Raises:
        AdapterError: the model has no cells, or the folder cannot be written.
    """
    write_adapter(adapter_of(model), folder)


def load_adapter(model: PreTrainedModel, folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Load an adapter (ours, the authors', a shipped one's name) into a model; augments it first if need be.

    Returns:
        the same model.

    Raises:
        AdapterError: of another base, or another form than the model's memory has (`FORM`), missing or extra tensors,
            NaN, unknown version. The model is then as before.
    """
    trained = read_adapter(folder)
    if hasattr(model, "ahn_config"):
        apply(trained, model)
        return model
    check_shape(trained, base_shape(model.config))
    augment(model, _fitting(trained.config, model.config.get_text_config()))
    try:
        apply(trained, model)
    except AdapterError:
        detach(model)
        raise
    return model


def convert(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
) -> Path:
    """Write an adapter in our format: the authors' checkpoint, or one of ours.

    With `base`, the folder also gets the base's weights and tokenizer: `ahn.from_pretrained(destination)` needs
    nothing else, and plain transformers can load the base from it.

    Returns:
        the destination folder.
    """
    trained, destination = read_adapter(source), Path(destination)
    if base is not None:
        model = bases.load_base(base, dtype="auto", device="cpu")
        check_shape(trained, base_shape(model.config))
        trained.base = os.fspath(base)
    write_adapter(trained, destination)  # first: a base alone would be loaded without its memory
    if base is not None:
        try:
            with quiet.quiet():
                model.save_pretrained(destination)
            bases.load_tokenizer(base).save_pretrained(destination)
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"{destination}: cannot be written: {error}") from error
    return destination
