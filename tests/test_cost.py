import json

import pytest

from ahn import cells
from ahn.config import AHNConfig
from ahn.cost import PAPER, Shape, cost, shape_of
from ahn.errors import ConfigError

LENGTH = 128_000
TINY = Shape(layers=2, D=64, N=4, M=2, H=16, F=128, V=100)


def test_paper_3b_cache_and_flops() -> None:
    result = cost(PAPER["qwen2.5-3b"], LENGTH)
    assert result.full_bytes == 9_437_184_000
    assert result.cache.memory * result.bytes_per_element == 2_453_667_840
    assert result.cache.saving == pytest.approx(0.740, abs=1e-3)
    assert result.mixing.full == pytest.approx(2.503e15, rel=1e-3)
    assert result.mixing.memory == pytest.approx(1.170e15, rel=1e-3)
    assert result.mixing.ratio == pytest.approx(0.467, abs=1e-3)
    assert result.flops.full == pytest.approx(3.286e15, rel=1e-3)
    assert result.flops.memory == pytest.approx(1.953e15, rel=1e-3)
    assert result.flops.saving == pytest.approx(0.405, abs=1e-3)


@pytest.mark.parametrize(("name", "flops", "ratio"), [("7b", 5.24e15, 0.654), ("14b", 11.83e15, 0.625)])
def test_paper_larger_models(name: str, flops: float, ratio: float) -> None:
    result = cost(PAPER[f"qwen2.5-{name}"], LENGTH)
    assert result.flops.full == pytest.approx(flops, rel=1e-3)
    assert result.flops.ratio == pytest.approx(ratio, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "cell", "millions"),
    [
        ("3b", "mamba2", 11.9),
        ("3b", "deltanet", 11.8),
        ("3b", "gated_deltanet", 13.0),
        ("7b", "mamba2", 18.6),
        ("7b", "deltanet", 18.5),
        ("7b", "gated_deltanet", 21.3),
        ("14b", "mamba2", 51.4),
        ("14b", "deltanet", 51.1),
        ("14b", "gated_deltanet", 61.0),
    ],
)
def test_paper_added_parameters(name: str, cell: str, millions: float) -> None:
    parameters = cost(PAPER[f"qwen2.5-{name}"], LENGTH, AHNConfig(cell)).parameters
    assert (parameters.memory - parameters.full) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("length", [1, 24, 32])
def test_nothing_is_saved_while_everything_is_lossless(length: int) -> None:
    result = cost(TINY, length, AHNConfig(window=24, sinks=8))
    assert result.written == 0
    assert result.cache.memory == result.cache.full
    assert result.flops.memory == result.flops.full


def test_first_written_token_adds_state_and_gates() -> None:
    result = cost(TINY, 33, AHNConfig(window=24, sinks=8))
    terms = {term.name: term for term in result.mixing.terms}
    assert result.written == 1
    assert terms["memory gates"].memory == 2 * 2 * 3 * TINY.D * TINY.N
    assert terms["memory state"].memory == terms["memory output"].memory == 2 * 2 * TINY.H**2 * TINY.N


def test_memory_does_not_grow_with_the_length() -> None:
    short, long = (cost(TINY, length, AHNConfig(window=24, sinks=8)) for length in (100, 100_000))
    assert short.cache.memory == long.cache.memory
    assert long.cache.full == 1000 * short.cache.full


def test_without_a_cell_there_are_only_sinks_and_window() -> None:
    result = cost(TINY, 1000, AHNConfig(None, window=24, sinks=8))
    assert result.parameters.memory == result.parameters.full
    assert result.cache.memory == TINY.kv_elements(32)
    assert not any(term.name.startswith("memory") for term in result.flops.terms)
    assert result.ours.memory == 0


@pytest.mark.parametrize("cell", [None, *cells.names()])
@pytest.mark.parametrize("length", [20, 50])
@pytest.mark.parametrize("feature_maps", [0, 2, 4])
def test_held_bytes_are_those_of_the_cache(cell: str | None, length: int, feature_maps: int) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    import ahn

    config = Qwen2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=100,
    )
    settings = ahn.AHNConfig(cell=cell, window=24, sinks=8, feature_maps=feature_maps)
    model = ahn.augment(Qwen2ForCausalLM(config).to(torch.bfloat16), settings)
    cache = ahn.read(model, torch.randint(100, (1, length)))
    expected = cost(Shape.from_config(config), length, settings, bytes_per_element=2)
    if length > 32:  # before, the buffers may have room for more tokens than they hold
        assert cache.nbytes == expected.held_bytes
    else:
        assert cache.nbytes >= expected.held_bytes


@pytest.mark.parametrize("cell", cells.names())
def test_formulas_count_the_cells_parameters(cell: str) -> None:
    import ahn

    module = ahn.cells.get(cell)(TINY.D, TINY.N, TINY.H)
    count = sum(parameter.numel() for parameter in module.parameters())
    if cell == "gated_deltanet":
        count += TINY.N  # the paper counts `D` of the authors' checkpoints, which has no effect
    table = cost(TINY, 100, AHNConfig(cell)).parameters
    assert table.memory - table.full == TINY.layers * count
    assert module.size(TINY.D, TINY.N, TINY.H).kept == module.num_gates


def test_shape_from_config_dict_and_file(tmp_path) -> None:
    values = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": None,
        "intermediate_size": 128,
        "vocab_size": 100,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "any", **values}))
    assert Shape.from_config(values) == TINY
    assert shape_of(str(path)) == shape_of(str(tmp_path)) == shape_of(values) == TINY
    assert Shape.from_config(values | {"head_dim": 32}).H == 32
    assert Shape.from_config({"text_config": values}) == TINY
    without = {key: value for key, value in values.items() if key != "num_key_value_heads"}
    assert Shape.from_config(without).M == 4


def test_shape_from_transformers_config() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=100,
    )
    assert Shape.from_config(config) == TINY


def test_paper_names_ignore_case() -> None:
    assert shape_of("Qwen2.5-7B") is PAPER["qwen2.5-7b"]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({}, "hidden_size=None"),
        ({"hidden_size": 64, "num_attention_heads": 0}, "num_attention_heads=0"),
        ({"hidden_size": "64"}, "hidden_size='64'"),
    ],
)
def test_bad_config_names_the_value(values: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Shape.from_config(values)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_bad_config_file(tmp_path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        shape_of(str(path))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("length", 0), ("length", 1.5), ("bytes_per_element", 0)],
)
def test_bad_settings_name_the_value(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=repr(value).replace(".", r"\.")):
        cost(TINY, **{"length": 100, setting: value})


@pytest.mark.parametrize("store", ["recency", "surprise"])
def test_held_bytes_with_a_store_are_the_caches(store: str) -> None:
    import ahn
    from conftest import tiny, token_ids, with_memory

    model = with_memory(tiny(), "deltanet", window=16, sinks=4, store=store, store_size=8, store_span=3)
    held = ahn.read(model, token_ids(60)).nbytes
    assert cost(shape_of(model.config), 60, model.ahn_config).held_bytes == held


def test_a_store_costs_what_a_window_of_its_size_does() -> None:
    store = AHNConfig(window=24, sinks=8, store="random", store_size=30)
    stored, longer = cost(TINY, 200, store), cost(TINY, 200, AHNConfig(window=54, sinks=8))
    assert stored.flops.memory == longer.flops.memory and stored.cache.memory == longer.cache.memory
    assert stored.written == longer.written
