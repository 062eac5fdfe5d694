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
PAPER_LOSSLESS = 32768  # tokens that the paper keeps exactly: 128 sinks + a window of 32,640


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
        adapter: name of a shipped adapter (`ahn.zoo.names()`), a folder or a hub id, in our format or the authors'.
            "none": sinks and window alone. Default: the adapter in the base's own folder; else, if no `cell` is named,
            the shipped one for this base; else none.
        window, sinks: tokens kept exactly. Default: the adapter's sizes. Without an adapter the paper's 32,640 + 128,
            or a quarter of the base's positions if it has fewer than these.
        cell: name of an untrained cell, to be trained. With an adapter it must be the adapter's.
        store, store_size, store_span: the store (AHNConfig, docs/store.md). None: each as in the adapter, so without an
            adapter there is no store. store="none": no store, even if the adapter has one.
        lossless: tokens kept exactly in all (sinks, store and window), instead of `window`
            (`AHNConfig.with_lossless`).
        dtype: default float32 on a CPU, bfloat16 on CUDA.
        device: default CUDA if there is one.

    Returns:
        the frozen model in eval mode. `model.ahn_config` holds its settings.

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
    # errors are raised before gigabytes are loaded
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
    """The base's own hub repository, if it holds a memory, as `save_pretrained` of an augmented model writes one."""
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
    """The default adapter of a local base, recognised by its weights, whatever its name is. None: not recognised."""
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
    """Check that a trained store gets its gates from the adapter.

    Raises:
        AdapterError: the store is a trained one, and the adapter is not for it.
        ConfigError: there is no store of this name.
    """
    if store is None or not stores.get(store).trained or (adapter is not None and adapter.config.store == store):
        return
    reason = "no adapter is given" if adapter is None else f"{adapter.source} has none"
    shipped = ", ".join(name for name in zoo.names() if zoo.store(name) == store)
    raise AdapterError(
        f"{{store}}: its gates are part of an adapter, and {reason}: expected one that has them"
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
    """An adapter's settings, with the default sizes of a base that has fewer positions than the adapter would keep."""
    context = getattr(base, "max_position_embeddings", None) or config.lossless
    if config.lossless <= context:
        return config
    default = default_config(base, config.cell)
    return config.replace(window=default.window, sinks=default.sinks)


def save_adapter(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Write the trained weights and settings of an augmented model's memory to `folder`.

    An earlier adapter in this folder is replaced as a whole, or stays untouched if the disk refuses.

    Raises:
        AdapterError: the model has no cells, or the folder cannot be written.
    """
    write_adapter(adapter_of(model), folder)


def load_adapter(model: PreTrainedModel, folder: str | os.PathLike[str]) -> PreTrainedModel:
    """Load an adapter into a model. A model without a memory is augmented first.

    Args:
        folder: a folder or a hub id, in our format or the authors', or the name of a shipped adapter.

    Returns:
        the same model.

    Raises:
        AdapterError: it is of another base, or of other settings than the model's memory (`ahn.hf.weights.FORM`); it
            has missing or extra tensors, NaN, or an unknown version. The model is then as before.
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
    """Write an adapter in our format.

    Args:
        source: the authors' checkpoint, or an adapter of ours.
        base: if given, the folder also gets this base's weights and tokenizer. Then `ahn.from_pretrained(destination)`
            needs nothing else, and plain transformers can load the base from it.

    Returns:
        the destination folder.
    """
    trained, destination = read_adapter(source), Path(destination)
    if base is not None:
        model = bases.load_base(base, dtype="auto", device="cpu")
        check_shape(trained, base_shape(model.config))
        trained.base = os.fspath(base)
    write_adapter(trained, destination)  # first: an interrupted run must not leave a base that loads without its memory
    if base is not None:
        try:
            with quiet.quiet():
                model.save_pretrained(destination)
            bases.load_tokenizer(base).save_pretrained(destination)
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"{destination}: cannot be written: {error}") from error
    return destination
