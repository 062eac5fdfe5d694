"""Adapters on disk: the trained weights of cells and stores and their settings, without the base.

Our format is a folder with `adapter.safetensors` (tensors `layers.{i}.{name}`) and `ahn.json`. The authors' checkpoints
(`model.layers.{i}.ahn.fn.{name}`, with their config keys) are read too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ahn import cells, hub, zoo
from ahn.config import AHNConfig
from ahn.errors import AdapterError, AHNError, ConfigError, some
from ahn.files import atomic
from ahn.memory.head_keys import RetrievalHeads
from ahn.registry import nearest
from ahn.version import __version__

VERSION = 1
RETRIEVAL = "retrieval."  # prefix of the tensors with the scales of retrieval heads; a layer's index follows
WEIGHTS, SETTINGS = "adapter.safetensors", "ahn.json"
SHAPE = ("hidden_size", "num_heads", "head_dim", "num_layers")  # of the base
MOST_SETTINGS = 1 << 20  # bytes of a JSON file, at most
AUTHORS_PREFIX, AUTHORS_INFIX = "model.layers.", ".ahn.fn."


@dataclass
class Adapter:
    """Trained weights and their settings, as they are on disk.

    Attributes:
        config: settings of the memory. Window and sinks are defaults that the user may change.
        shape: `hidden_size`, `num_heads`, `head_dim`, `num_layers` of the base.
        tensors: named `layers.{i}.{parameter}`.
        base: name of the base, for messages.
        source: name of a shipped adapter, or the folder that it was read from.
        retrieval: heads of the base that find passages (`ahn.recall`), or None.
    """

    config: AHNConfig
    shape: dict[str, int]
    tensors: dict[str, Tensor] = field(repr=False)
    base: str | None = None
    source: str = ""
    retrieval: RetrievalHeads | None = None


def read_adapter(source: str | os.PathLike[str]) -> Adapter:
    """Read an adapter, given by a shipped one's name, a folder or a hub id. Raises AdapterError."""
    folder = _folder(source)
    if (folder / SETTINGS).is_file():
        return _read_ours(folder)
    if (folder / "config.json").is_file():
        return _read_authors(folder)
    raise AdapterError(f"{folder}: no adapter: expected {SETTINGS}, or an authors' checkpoint with config.json")


def write_adapter(adapter: Adapter, folder: str | os.PathLike[str]) -> None:
    """Write an adapter. Both files are whole on disk before either replaces another. Raises AdapterError."""
    from safetensors.torch import save_file

    folder = Path(folder)
    if spoilt := [name for name, tensor in adapter.tensors.items() if not tensor.isfinite().all()]:
        raise AdapterError(f"{folder}: not written: {some(spoilt)} hold NaN or infinite numbers")
    settings = {
        "version": VERSION,
        "package": __version__,
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


def base_shape(config: Any) -> dict[str, int]:
    """The sizes of a base, given by its transformers config, that an adapter must fit."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return dict(zip(SHAPE, (config.hidden_size, heads, size, config.num_hidden_layers), strict=True))


def check_shape(adapter: Adapter, shape: dict[str, int]) -> None:
    """Raises AdapterError if an adapter is not for a base of this shape (`base_shape`)."""
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
    path = hub.expanded(source)
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
        offline = hub.hub_unreachable(name) is not None
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], local_files_only=offline))
    except Exception as error:  # offline, no such repository, no rights: the hub's own words say which
        raise AdapterError(f"{name}: not a folder here, and not to be had from the hub: {first_line(error)}") from error


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
    # Their config holds the window and sinks of training. The paper's for inference are the defaults of AHNConfig.
    config = AHNConfig(
        names[implementation],
        layers=tuple(i for i in range(count) if i not in full) if full else None,
        sink_positions="absolute",
    )
    shape = dict(zip(SHAPE, (hidden, heads, size, count), strict=True))
    base = settings.get("_name_or_path")
    return Adapter(config, shape, tensors, base if isinstance(base, str) else None, str(folder))


def _layer_indices(path: Path, listed: Any, count: int) -> set[int]:
    """The layers with full attention, listed as "0, 7, 14" in the authors' config."""
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
    """The value of a key. Raises AdapterError if it is missing, of another type, or an integer below 1."""
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
    except (
        Exception
    ) as error:  # missing, truncated, not safetensors: each has its own type, and the user can do the same about all
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


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
