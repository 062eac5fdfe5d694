"""Read text longer than a language model's context in constant memory.

A frozen Transformer keeps the first tokens (sinks) and the last ones (window) exactly. A small trained recurrent
cell compresses the tokens that leave the window into a state of fixed size (Artificial Hippocampus Networks, arXiv
2510.07318). Importing this package loads neither torch nor transformers and patches nothing. It asks OpenMP to
let idle threads sleep (`OMP_WAIT_POLICY=passive`), unless torch is loaded already or the environment says otherwise.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ahn.version import __version__ as __version__

# On a busy machine, threads that spin while they wait take the cores from the threads that they wait for. OpenMP reads
# this variable once, when torch loads it. The other two are its older names in GNU's and Intel's library.
if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "passive"

_PUBLIC = {
    "AHNCache": "memory.cache",
    "AHNConfig": "config",
    "Answer": "recall.ask",
    "Dialogue": "dialogue",
    "NOT_FOUND": "dialogue",
    "ask": "recall.ask",
    "augment": "hf.augment",
    "convert": "adapter",
    "detach": "hf.augment",
    "from_pretrained": "adapter",
    "generate": "engine.generate",
    "load_adapter": "adapter",
    "load_tokenizer": "bases",
    "read": "engine.prefill",
    "read_documents": "recall.reading",
    "save_adapter": "adapter",
}
_MODULES = ("cells", "errors", "stores", "zoo")

__all__ = ["__version__", *sorted(_PUBLIC), *_MODULES]

if TYPE_CHECKING:
    from ahn import cells as cells
    from ahn import errors as errors
    from ahn import stores as stores
    from ahn import zoo as zoo
    from ahn.adapter import convert as convert
    from ahn.adapter import from_pretrained as from_pretrained
    from ahn.adapter import load_adapter as load_adapter
    from ahn.adapter import save_adapter as save_adapter
    from ahn.bases import load_tokenizer as load_tokenizer
    from ahn.config import AHNConfig as AHNConfig
    from ahn.dialogue import NOT_FOUND as NOT_FOUND
    from ahn.dialogue import Dialogue as Dialogue
    from ahn.engine.generate import generate as generate
    from ahn.engine.prefill import read as read
    from ahn.hf.augment import augment as augment
    from ahn.hf.augment import detach as detach
    from ahn.memory.cache import AHNCache as AHNCache
    from ahn.recall.ask import Answer as Answer
    from ahn.recall.ask import ask as ask
    from ahn.recall.reading import read_documents as read_documents


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(f"ahn.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return import_module(f"ahn.{name}")
    raise AttributeError(f"module 'ahn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
