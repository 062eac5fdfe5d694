"""Adapters: the trained weights of cells and stores, with what they were trained for, and nothing of the base.

Ours is a folder with `adapter.safetensors` (tensors `layers.{i}.{name}`) and `ahn.json`; the authors' checkpoints
(`model.layers.{i}.ahn.fn.{name}`, their config keys) are read unchanged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ahn import bases, cells, stores, zoo
from ahn.config import AHNConfig
from ahn.errors import AdapterError, AHNError, BaseModelError, ConfigError, some
from ahn.files import atomic
from ahn.hf.architecture import set_unlimited
from ahn.hf.augment import augment, detach
from ahn.memory.handle import frame_of, layers_of
from ahn.memory.head_keys import RetrievalHeads
from ahn.registry import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

VERSION = 1
NONE = "none"
CELLS = ".ahn."  # in the names of a model's weights that are the memory's
STORE = "store."  # in front of the names of a store's weights
RETRIEVAL = "retrieval."  # in front of the layers of the scales of retrieval heads
WEIGHTS, SETTINGS = "adapter.safetensors", "ahn.json"
SHAPE = ("hidden_size", "num_heads", "head_dim", "num_layers")  # of the base
FORM = ("cell", "layers", "memory_positions", "key_maps", "make_room")  # what weights are made for
MOST_SETTINGS = 1 << 20  # bytes of a JSON file
AUTHORS_PREFIX, AUTHORS_INFIX = "model.layers.", ".ahn.fn."
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of weights
PAPER_LOSSLESS = 32768  # tokens kept exactly in the paper: 128 sinks + 32,640 window


@dataclass
class Adapter:
    """Trained weights as they are on disk.

    Attributes:
        config: the memory they were made for; window and sinks are defaults the user may change.
        shape: `hidden_size`, `num_heads`, `head_dim`, `num_layers` of the base.
        tensors: by `layers.{i}.{parameter}`.
        base: name of the base, for people. source: a shipped one's name, or where it was read from.
        retrieval: heads of the base that find passages (`ahn.recall`), or None.
    """

    config: AHNConfig
    shape: dict[str, int]
    tensors: dict[str, Tensor] = field(repr=False)
    base: str | None = None
    source: str = ""
    retrieval: RetrievalHeads | None = None


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
            raise ConfigError(f"cell={cell!r}: adapter {adapter} is for {trained.config.cell!r}")
    if cell is not None:
        cells.check_name(cell)
    given = {"window": window, "sinks": sinks, "store": store, "store_size": store_size, "store_span": store_span}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if lossless is not None and window is not None:
        raise ConfigError(f"lossless={lossless} with window={window}: expected one of them")
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
    if adapter is None and (bases.expanded(base) / SETTINGS).is_file():
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
        hf_hub_download(name, SETTINGS, local_files_only=bases.hub_unreachable(name) is not None)
    except (EntryNotFoundError, LocalEntryNotFoundError, BaseModelError):
        return None
    except Exception as error:  # the hub client's HTTP library, and so its errors, differ between its versions
        raise AdapterError(f"{name}: whether it holds a memory cannot be asked: {_first_line(error)}") from error
    return name


def _recognised(base: str | os.PathLike[str]) -> str | None:
    """The default adapter of the base that a local file or folder holds under whatever name."""
    path = bases.expanded(base)
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
        f"store={store!r}: its gates are part of an adapter, and {what}: expected one that has them"
        f"{f', as {shipped}' if shipped else ''}, or another store"
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


def save_with_base(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """`save_pretrained` of an augmented model: the base as transformers saves it, and the memory as an adapter beside
    it. `ahn.from_pretrained` loads both, plain transformers the base alone. Arguments as of transformers.

    Raises:
        AdapterError: the memory holds NaN, or the folder cannot be written; no base is then without its memory.
    """
    folder = Path(save_directory)
    hub = {key: options.pop(key) for key in ("repo_id", "commit_message", "private", "create_pr") if key in options}
    weights = model.state_dict() if state_dict is None else state_dict
    base = {name: tensor for name, tensor in weights.items() if CELLS not in name}
    memory = _gathered(model)
    if is_main_process:
        write_adapter(memory, folder)
    set_unlimited(model, False)  # plain transformers loads a base that is limited
    try:
        type(model).save_pretrained(model, folder, is_main_process, base, **options)
    finally:
        set_unlimited(model, True)
    if push_to_hub:  # which saves once more, into a folder of its own
        model.push_to_hub(hub.pop("repo_id", folder.name), **hub)


def adapter_of(model: PreTrainedModel) -> Adapter:
    """The trained weights and settings of an augmented model's memory, on the CPU. Weights that are sharded over
    processes are gathered: all of them must call this. Raises AdapterError if the model has neither cells nor
    retrieval heads."""
    config = getattr(model, "ahn_config", None)
    if config is None or not (_parameters(model) or model.ahn_retrieval):
        raise AdapterError("the model has no cells, only sinks and window: there is nothing to save")
    return _gathered(model)


def _gathered(model: PreTrainedModel) -> Adapter:
    config, parameters = model.ahn_config, _parameters(model)
    whole: dict[str, Any] = {
        name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in parameters.items()
    }
    tensors = {name: p.detach().cpu().contiguous() for name, p in whole.items()}
    return Adapter(config, base_shape(model.config), tensors, model.ahn_names["base"], retrieval=model.ahn_retrieval)


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
            with bases.quiet():
                model.save_pretrained(destination)
            bases.load_tokenizer(base).save_pretrained(destination)
        except (OSError, SafetensorError) as error:
            raise AdapterError(f"{destination}: cannot be written: {error}") from error
    return destination


def read_adapter(source: str | os.PathLike[str]) -> Adapter:
    """Weights and settings from a shipped adapter's name, a folder or a hub id. Raises AdapterError."""
    folder = _folder(source)
    if (folder / SETTINGS).is_file():
        return _read_ours(folder)
    if (folder / "config.json").is_file():
        return _read_authors(folder)
    raise AdapterError(f"{folder}: no adapter: expected {SETTINGS}, or an authors' checkpoint with config.json")


def write_adapter(adapter: Adapter, folder: str | os.PathLike[str]) -> None:
    """Both files are complete on disk before either takes its place. Raises AdapterError, also for NaN."""
    from safetensors.torch import save_file

    import ahn

    folder = Path(folder)
    if spoilt := [name for name, tensor in adapter.tensors.items() if not tensor.isfinite().all()]:
        raise AdapterError(f"{folder}: not written: {some(spoilt)} hold NaN or infinite numbers")
    settings = {
        "version": VERSION,
        "package": ahn.__version__,
        "base": adapter.base,
        "shape": adapter.shape,
        "config": adapter.config.to_dict(),
    }
    tensors = dict(adapter.tensors)
    if adapter.retrieval is not None:
        settings["retrieval"] = adapter.retrieval.to_dict()
        tensors |= {f"{RETRIEVAL}{layer}": scales for layer, scales in adapter.retrieval.scales.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic(folder / SETTINGS) as settings_path, atomic(folder / WEIGHTS) as weights_path:
            save_file(tensors, weights_path)
            settings["sha256"] = hashlib.sha256(weights_path.read_bytes()).hexdigest()
            settings_path.write_text(json.dumps(settings, indent=2) + "\n")
    except (AHNError, OSError) as error:
        raise AdapterError(str(error)) from error


def apply(adapter: Adapter, model: PreTrainedModel, new_store: bool = False) -> None:
    """Copy an adapter's weights into an augmented model, after all checks. Raises AdapterError.

    `new_store`: the model's store may have weights that the adapter has not, because they are to be trained.
    """
    config: AHNConfig = model.ahn_config
    source = adapter.source
    check_shape(adapter, base_shape(model.config))
    for name in FORM:
        ours, theirs = getattr(config, name), getattr(adapter.config, name)
        if ours != theirs:
            raise AdapterError(f"{source}: adapter for {name}={theirs!r}, the model has {name}={ours!r}")
    parameters, tensors = _parameters(model), adapter.tensors
    if config.store != adapter.config.store:  # cells serve any store, the weights of a store only their own
        tensors = {name: tensor for name, tensor in tensors.items() if f".{STORE}" not in name}
    missing, extra = sorted(parameters.keys() - tensors), sorted(tensors.keys() - parameters)
    if new_store:
        missing = [name for name in missing if f".{STORE}" not in name]
    if missing and all(f".{STORE}" in name for name in missing):
        raise AdapterError(
            f"{source}: has no weights for store={config.store!r}, which is a trained one (adapter for "
            f"store={adapter.config.store!r})"
        )
    if missing:
        raise AdapterError(f"{source}: {len(missing)} tensors missing: {some(missing)}")
    if extra:
        raise AdapterError(f"{source}: {len(extra)} tensors too many: {some(extra)}")
    parameters = {name: parameter for name, parameter in parameters.items() if name in tensors}
    for name, parameter in parameters.items():
        tensor = tensors[name]
        if tensor.shape != parameter.shape:
            raise AdapterError(
                f"{source}: {name} has shape {list(tensor.shape)}, the base needs {list(parameter.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise AdapterError(f"{source}: {name} is of {tensor.dtype}: expected one of {', '.join(map(str, DTYPES))}")
        if not tensor.to(parameter.dtype).isfinite().all():
            raise AdapterError(
                f"{source}: {name} holds NaN or infinite numbers, or too large ones for {parameter.dtype}"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    model.ahn_retrieval = adapter.retrieval
    model.ahn_names["adapter"] = source
    frame_of(model).adapter = object()  # memories that were read with other weights are refused from now on


def _parameters(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    found: dict[str, torch.nn.Parameter] = {}
    for i, layer in enumerate(layers_of(model)):
        if layer.cell is not None:
            found |= {f"layers.{i}.{name}": parameter for name, parameter in layer.cell.named_parameters()}
        if layer.store is not None:
            found |= {f"layers.{i}.{STORE}{name}": parameter for name, parameter in layer.store.named_parameters()}
    return found


def base_shape(config: Any) -> dict[str, int]:
    """What of a base, by its transformers config, an adapter must fit."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return dict(zip(SHAPE, (config.hidden_size, heads, size, config.num_hidden_layers), strict=True))


def check_shape(adapter: Adapter, shape: dict[str, int]) -> None:
    different = [
        f"{key} {adapter.shape.get(key)}, not {value}"
        for key, value in shape.items()
        if adapter.shape.get(key) != value
    ]
    if different:
        raise AdapterError(f"{adapter.source}: adapter of another base ({adapter.base}): {'; '.join(different)}")


def _folder(source: str | os.PathLike[str]) -> Path:
    if (shipped := zoo.path(os.fspath(source))) is not None:
        return shipped
    path = bases.expanded(source)
    if path.is_dir():
        return path
    if path.exists():
        raise AdapterError(f"{path}: expected the adapter's folder, not a file")
    name = os.fspath(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        known = ", ".join(zoo.names()) or "none"
        raise AdapterError(
            f"{name}: no such adapter: expected a folder, a hub id OWNER/NAME, or a shipped one ({known})"
            f"{nearest(name, zoo.names())}"
        )
    from huggingface_hub import snapshot_download

    try:
        offline = bases.hub_unreachable(name) is not None
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], local_files_only=offline))
    except Exception as error:  # offline, no such repository, no rights: the hub's own words say which
        raise AdapterError(
            f"{name}: not a folder here, and not to be had from the hub: {_first_line(error)}"
        ) from error


def _read_ours(folder: Path) -> Adapter:
    path, weights = folder / SETTINGS, folder / WEIGHTS
    settings = _json(path)
    if settings.get("version") != VERSION:
        raise AdapterError(
            f"{folder}: adapter of version {settings.get('version')!r}: this ahn reads version {VERSION}"
        )
    base = settings.get("base")
    if not (base is None or isinstance(base, str)):
        raise AdapterError(f"{path}: base is {base!r}: expected text or null")
    given, digest = _of_type(path, settings, "config", dict), _of_type(path, settings, "sha256", str)
    shape = _of_type(path, settings, "shape", dict)
    try:
        config = AHNConfig.from_dict(given)
    except (ConfigError, TypeError, ValueError) as error:
        raise AdapterError(f"{path}: {error}") from error
    shape = {key: _of_type(path, shape, key, int) for key in SHAPE}
    tensors = _tensors(weights)
    with weights.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise AdapterError(f"{weights}: damaged: its checksum is not the one in {SETTINGS}")
    source = folder.name if zoo.path(folder.name) == folder else str(folder)
    scales = {name: tensors.pop(name) for name in sorted(tensors) if name.startswith(RETRIEVAL)}
    retrieval = None
    if settings.get("retrieval") is not None:
        try:
            by_layer = {int(name.removeprefix(RETRIEVAL)): scale for name, scale in scales.items()}
            retrieval = RetrievalHeads.from_dict(settings["retrieval"], by_layer)
        except ValueError as error:
            raise AdapterError(f"{path}: {error}") from error
        if retrieval.layers[-1] >= shape["num_layers"]:
            raise AdapterError(
                f"{path}: retrieval heads of layer {retrieval.layers[-1]}: the base has {shape['num_layers']}"
            )
    return Adapter(config, shape, tensors, base, source, retrieval)


def _read_authors(folder: Path) -> Adapter:
    path = folder / "config.json"
    settings = _json(path)
    names = {cls.authors_name: name for name in cells.names() if (cls := cells.get(name)).authors_name}
    implementation = settings.get("_ahn_implementation")
    if not isinstance(implementation, str) or implementation not in names:
        raise AdapterError(
            f"{folder}: _ahn_implementation is {implementation!r}: expected one of {', '.join(map(str, names))}"
        )
    for key in ("use_q_proj", "use_ahn_router"):
        if settings.get(key):
            raise AdapterError(f"{folder}: {key} is on: checkpoints with it were never released and cannot be read")
    hidden, heads, count = (
        _of_type(path, settings, key, int) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    size = _of_type(path, settings, "head_dim", int) if settings.get("head_dim") is not None else hidden // heads
    full = _layer_indices(path, settings.get("fa_layer_ids"), count)
    cell = cells.get(names[implementation])
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in _tensors(file, lambda name: AUTHORS_INFIX in name).items():
            layer, _, parameter = name.removeprefix(AUTHORS_PREFIX).partition(AUTHORS_INFIX)
            if parameter not in cell.authors_unused:
                tensors[f"layers.{layer}.{parameter}"] = tensor
    if not tensors:
        raise AdapterError(f"{folder}: no tensors named {AUTHORS_PREFIX}N{AUTHORS_INFIX}*")
    # Their window, sinks and window type are those of training: inference takes the paper's.
    config = AHNConfig(
        names[implementation],
        layers=tuple(i for i in range(count) if i not in full) if full else None,
        sink_positions="absolute",
    )
    shape = dict(zip(SHAPE, (hidden, heads, size, count), strict=True))
    base = settings.get("_name_or_path")
    return Adapter(config, shape, tensors, base if isinstance(base, str) else None, str(folder))


def _layer_indices(path: Path, listed: Any, count: int) -> set[int]:
    """The layers with full attention, "0, 7, 14" in the authors' config."""
    words = [] if listed is None else str(listed).strip("[]").replace(",", " ").split()
    try:
        found = {int(word) for word in words}
    except ValueError:
        found = {-1}
    if not found <= set(range(count)) or len(found) == count:
        raise AdapterError(
            f"{path}: fa_layer_ids is {listed!r}: expected indices of layers, 0 to {count - 1} and not all of them"
        )
    return found


def _of_type(path: Path, values: dict[str, Any], key: str, kind: type) -> Any:
    """The value of a key. Raises AdapterError if there is none, or one of another type; integers are above 0."""
    words = {int: "an integer of at least 1", str: "text", dict: "an object"}[kind]
    if key not in values:
        raise AdapterError(f"{path}: no {key!r}: expected {words}")
    value: Any = values[key]
    counted = value if kind is int and type(value) is int else 1
    if type(value) is not kind or not 1 <= counted < 2**31:
        raise AdapterError(f"{path}: {key} is {value!r}: expected {words}")
    return value


def _tensors(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    from safetensors import safe_open

    if not path.is_file():
        raise AdapterError(f"{path}: cannot be read: no such file")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118 - not a dict
    except Exception as error:  # missing, truncated, not safetensors: one type each, all mean the same to the user
        raise AdapterError(f"{path}: cannot be read: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_SETTINGS:
            raise AdapterError(f"{path}: cannot be read: more than {MOST_SETTINGS:,} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{path}: expected a JSON object")
    return values


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
