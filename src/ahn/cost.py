"""The cost of full attention and of a memory, term by term: parameters, cache and FLOPs.

The formulas are the paper's (arXiv 2510.07318, Table 1): matrix products only, a multiply-add is 2 FLOPs, and biases
and norms of the base are left out. Everything is a plain Python integer. Torch is loaded only with the class of a cell
or a store, which says how large it is.

Letters: D hidden size, N query heads, M key/value heads, H head size, K key size of the state (H, or more with feature
maps), F width of the gated MLP, V vocabulary, L length, W window, S sinks, P size of the store, W' = S + P + W lossless
tokens.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahn.config import AHNConfig
from ahn.errors import ConfigError

if TYPE_CHECKING:
    from ahn.cells.base import CellSize


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-shaped decoder: `layers` blocks of attention and a gated MLP, between two D x V matrices.

    tied: whether the two matrices are one.
    """

    layers: int
    D: int
    N: int
    M: int
    H: int
    F: int
    V: int
    tied: bool = False

    @classmethod
    def from_config(cls, config: Any) -> Shape:
        """Shape of a transformers config, its dict, or the path of a `config.json` or of the folder with one.

        Raises:
            ConfigError: the file cannot be read, or a size is missing or not a positive integer.
        """
        values = _config_values(config)
        values = values.get("text_config") or values

        def size(key: str, default: int | None = None) -> int:
            value = values.get(key)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{key}={value!r} in the model's config: expected a positive integer")
            return value

        D, N = size("hidden_size"), size("num_attention_heads")
        return cls(
            layers=size("num_hidden_layers"),
            D=D,
            N=N,
            M=size("num_key_value_heads", N),
            H=size("head_dim", D // N),
            F=size("intermediate_size"),
            V=size("vocab_size"),
            tied=bool(values.get("tie_word_embeddings", False)),
        )

    def kv_elements(self, tokens: int) -> int:
        """Cache elements of full attention over `tokens` tokens, all layers: 2 L H M a layer."""
        return self.layers * 2 * tokens * self.H * self.M


PAPER = {
    "qwen2.5-3b": Shape(36, 2048, 16, 2, 128, 11008, 151936, tied=True),
    "qwen2.5-7b": Shape(28, 3584, 28, 4, 128, 18944, 152064),
    "qwen2.5-14b": Shape(48, 5120, 40, 8, 128, 13824, 152064),
}


@dataclass(frozen=True)
class Term:
    """A line of a table, summed over all layers. `formula` is that of one layer: `full -> memory` if they differ."""

    name: str
    formula: str
    full: int
    memory: int


@dataclass(frozen=True)
class Table:
    """Terms that add up. `full` is the base with full attention, `memory` the base with sinks, window and cell."""

    terms: tuple[Term, ...]

    @property
    def full(self) -> int:
        return sum(term.full for term in self.terms)

    @property
    def memory(self) -> int:
        return sum(term.memory for term in self.terms)

    @property
    def ratio(self) -> float:
        return self.memory / self.full

    @property
    def saving(self) -> float:
        return 1 - self.ratio

    def __add__(self, other: Table) -> Table:
        return Table(self.terms + other.terms)


@dataclass(frozen=True)
class Cost:
    """Result of `cost`.

    Attributes:
        parameters: parameters of the whole model.
        cache: elements held for one sequence, as the paper counts them; times `bytes_per_element` for bytes.
        ours: further elements in this library's cache: the write gates of the lossless tokens.
        mixing: FLOPs of token mixing (attention and memory) for reading `length` tokens.
        rest: FLOPs of the MLPs and of the two D x V matrices, the same on both sides. The paper counts both matrices
            for every token; `ahn.read` computes logits for the last token only.
    """

    shape: Shape
    length: int
    config: AHNConfig
    bytes_per_element: int
    parameters: Table
    cache: Table
    ours: Table
    mixing: Table
    rest: Table

    @property
    def flops(self) -> Table:
        """FLOPs of the whole model: `mixing` and `rest`."""
        return self.mixing + self.rest

    @property
    def full_bytes(self) -> int:
        """Cache of full attention."""
        return self.cache.full * self.bytes_per_element

    @property
    def held_bytes(self) -> int:
        """`AHNCache.nbytes` after reading: `ours` is included, and the state is always float32."""
        return held_bytes(self.shape, self.config, self.length, self.bytes_per_element)

    @property
    def store_bytes(self) -> int:
        """The part of `held_bytes` that a store adds to its keys, values and gates."""
        return self.shape.layers * store_bytes(self.shape, self.config, self.length)

    @property
    def written(self) -> int:
        """Tokens that only the cell's state holds."""
        return max(0, self.length - self.config.lossless)


def cost(shape: Shape, length: int, config: AHNConfig | None = None, bytes_per_element: int = 4) -> Cost:
    """Cost of reading `length` tokens of one sequence with full attention, and with a memory in every layer.

    Up to `sinks + store_size + window` tokens the cell absorbs nothing, and the two sides differ in parameters only.

    Args:
        shape: the base model, see `shape_of`.
        length: tokens read, at least 1.
        config: the memory, by default the paper's. Its `layers` are ignored. The gates of a trained store and the work
            of eviction are not counted; they are below one percent.
        bytes_per_element: of the cache, 4 for float32 as in the paper.

    Raises:
        ConfigError: names the value and what is allowed.
    """
    for name, value in (("length", length), ("bytes", bytes_per_element)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}={value!r}: expected an integer of at least 1")
    config = (config or AHNConfig()).replace(layers=None)
    cell, feature_maps, window_gate = config.cell, config.feature_maps, config.window_gate
    size = _cell_size(cell, shape)
    layers, D, N, M, H, F, V = shape.layers, shape.D, shape.N, shape.M, shape.H, shape.F, shape.V

    lossless = min(length, config.lossless)
    written = length - lossless
    output, state = (H * H * N, key_size(shape, feature_maps) * H * N) if cell else (0, 0)
    maps = 2 * state if feature_maps else 0
    square = "KHN" if feature_maps > 1 else "H²N"

    def term(name: str, formula: str, full: int, memory: int) -> Term:
        return Term(name, formula, layers * full, layers * memory)

    def cell_terms(*terms: Term) -> tuple[Term, ...]:
        return terms if cell else ()

    projections = 2 * D * H * (N + M)
    vocabulary = V * D * (1 if shape.tied else 2)
    parameters = Table(
        (
            term("projections", "2DH(N+M)", projections, projections),
            term("MLP", "3DF", 3 * D * F, 3 * D * F),
            Term("vocabulary", "VD, once" if shape.tied else "2VD, once", vocabulary, vocabulary),
            *cell_terms(
                term("memory gates", f"{size.gates}DN", 0, size.gates * D * N),
                term("memory output", "H²N", 0, output),
                term("memory vectors", size.small_formula, 0, size.small),
                *((term("memory features", f"2{square}", 0, maps),) if feature_maps else ()),
                *((term("window gate", "DN + 3N", 0, D * N + 3 * N),) if window_gate else ()),
            ),
        )
    )
    cache = Table(
        (
            term("keys and values", "2LHM -> 2W'HM", 2 * length * H * M, 2 * lossless * H * M),
            *cell_terms(term("memory state", square, 0, state if written else 0)),
        )
    )
    softmax = 2 * H * N * lossless**2 + 4 * written * lossless * H * N
    mixing = Table(
        (
            term("projections", "4LDH(N+M)", 2 * length * projections, 2 * length * projections),
            term("attention", "2HNL² -> 2HNW'² + 4(L-W')W'HN", 2 * H * N * length**2, softmax),
            *cell_terms(
                term("memory state", f"2(L-W'){square}", 0, 2 * written * state),
                term("memory gates", f"2(L-W'){size.gates}DN", 0, 2 * written * size.gates * D * N),
                term("memory output", "2(L-W')H²N", 0, 2 * written * output),
                *((term("memory features", f"4(L-W'){square}", 0, 2 * written * maps),) if feature_maps else ()),
                *((term("window gate", "2(L-W')DN", 0, 2 * written * D * N),) if window_gate else ()),
            ),
        )
    )
    rest = Table(
        (
            term("MLP", "6LDF", 6 * length * D * F, 6 * length * D * F),
            Term("vocabulary", "4LDV, once", 4 * length * D * V, 4 * length * D * V),
        )
    )
    ours = Table(cell_terms(term("write gates", f"{size.kept} W'N", 0, size.kept * lossless * N)))
    return Cost(shape, length, config, bytes_per_element, parameters, cache, ours, mixing, rest)


def key_size(shape: Shape, feature_maps: int) -> int:
    """K: the state has K x H numbers a head."""
    return max(1, feature_maps) * shape.H


def cell_bytes(shape: Shape, config: AHNConfig, tokens: int, bytes_per_element: int) -> int:
    """Bytes that the cell needs in one layer after `tokens` tokens: its float32 state, and the write gates of the
    lossless tokens."""
    if config.cell is None:
        return 0
    gates = _cell_size(config.cell, shape).kept
    return _state_bytes(shape, config) + min(tokens, config.lossless) * gates * shape.N * bytes_per_element


def store_bytes(shape: Shape, config: AHNConfig, tokens: int) -> int:
    """Bytes that the store needs in one layer after `tokens` tokens, besides keys, values and write gates.

    These are a rank for each slot, once a token has left the window; a score for each token in the window and
    in a span before it; and a copy of the state if the store reads it.
    """
    if config.store is None:
        return 0
    from ahn import stores

    ranks = 8 * shape.M * config.store_size if tokens > config.sinks + config.window else 0
    scores = 4 * shape.M * (config.window + config.store_span - 1)
    copies = _state_bytes(shape, config) if stores.get(config.store).reads_state else 0
    return ranks + scores + copies


def held_bytes(shape: Shape, config: AHNConfig, tokens: int, bytes_per_element: int) -> int:
    """`AHNCache.nbytes` after reading `tokens` tokens of one sequence in one call."""
    forgetting = shape.layers if config.layers is None else len(config.layers)
    token = 2 * shape.M * shape.H * bytes_per_element  # in one layer
    kept = forgetting * min(tokens, config.lossless) + (shape.layers - forgetting) * tokens
    beside = cell_bytes(shape, config, tokens, bytes_per_element) + store_bytes(shape, config, tokens)
    return kept * token + forgetting * beside


def _cell_size(cell: str | None, shape: Shape) -> CellSize:
    from ahn import cells
    from ahn.cells.base import CellSize

    return cells.get(cell).size(shape.D, shape.N, shape.H) if cell else CellSize(0, 0, 0, "")


def _state_bytes(shape: Shape, config: AHNConfig) -> int:
    return 4 * shape.N * key_size(shape, config.feature_maps) * shape.H


def shape_of(base: Any) -> Shape:
    """Shape of a base: a key of `PAPER`, an argument of `Shape.from_config`, or any base of `ahn.from_pretrained`.

    Only the config is read, never the weights.
    """
    if isinstance(base, str) and base.lower() in PAPER:
        return PAPER[base.lower()]
    if isinstance(base, str) and not (Path(base) / "config.json").is_file() and not base.endswith(".json"):
        from ahn.bases import base_config

        if near := difflib.get_close_matches(base.lower(), PAPER, n=1, cutoff=0.8):
            raise ConfigError(f"unknown shape {base!r}: did you mean {near[0]!r}?")
        base = base_config(base)
    return Shape.from_config(base)


def _config_values(config: Any) -> dict[str, Any]:
    if isinstance(config, dict):
        return config
    if not isinstance(config, str | Path):
        # attribute access instead of to_dict(): it follows the names a family maps (n_embd -> hidden_size)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        keys = "num_hidden_layers hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size"
        return {key: getattr(text, key, None) for key in (*keys.split(), "vocab_size", "tie_word_embeddings")}
    path = Path(config)
    path = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the model config {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"cannot read the model config {path}: expected a JSON object")
    return values
