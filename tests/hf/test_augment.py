"""On and off a model without a trace; what cannot be served; constant memory; dtypes; compile; quantised bases."""

import copy

import pytest
import torch

import ahn
from ahn.compat import PAST
from ahn.errors import AHNError, ConfigError, UnsupportedModelError
from ahn.hf.augment import set_window
from ahn.memory.handle import handle_of
from conftest import in_pieces, retrieval, tiny, token_ids, with_memory


def test_detach_restores_the_base_exactly():
    base = tiny()
    base.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    ids = token_ids(60)
    state = {name: t.clone() for name, t in base.state_dict().items()}
    config, implementation = copy.deepcopy(base.config.to_dict()), base.config._attn_implementation
    trainable = {name: p.requires_grad for name, p in base.named_parameters()}
    with torch.no_grad():
        expected = base(ids).logits
    attributes = set(vars(base))

    with_memory(base)
    assert base(ids).logits.shape == expected.shape
    assert ahn.detach(base) is base

    after = base.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], t) for name, t in state.items())
    assert {name: p.requires_grad for name, p in base.named_parameters()} == trainable
    assert base.config.to_dict() == config
    assert base.config._attn_implementation == implementation
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    assert set(vars(base)) == attributes
    with torch.no_grad():
        assert torch.equal(base(ids).logits, expected)


def test_settings_on_the_model_are_those_of_its_layers():
    """They are views of the handle; what cannot be set says so, and names what to call."""
    model = with_memory(tiny())
    config, handle = model.ahn_config, handle_of(model)
    with pytest.raises(ConfigError, match=r"set_window\(model, window, sinks\).*ahn\.detach"):
        model.ahn_config = config.replace(window=8)
    with pytest.raises(ConfigError, match=r'ahn_names\["base"\]'):
        model.ahn_names = {}
    assert model.ahn_config is config is handle.config and not {"ahn_config", "ahn_names"} & set(vars(model))
    set_window(model, 8, 2)
    assert model.ahn_config == config.replace(window=8, sinks=2)
    assert all(layer.sizes.window == 8 for layer in handle.layers)
    model.ahn_names["base"], model.ahn_retrieval = "mine", retrieval()
    assert handle.names["base"] == "mine" and handle.retrieval is model.ahn_retrieval is not None
    twin = copy.deepcopy(model)
    set_window(twin, 16, 4)
    assert (twin.ahn_config.window, model.ahn_config.window) == (16, 8)
    assert twin.ahn_names == model.ahn_names and twin.ahn_names is not model.ahn_names


def test_the_class_of_a_model_is_its_own_again():
    """Other models of the class never see a difference, and the name that configs and fingerprints hold stays."""
    model, other = tiny(), tiny()
    base = type(model)
    with_memory(model)
    assert isinstance(model, base) and type(model) is not base and type(model).__name__ == base.__name__
    assert type(with_memory(tiny())) is type(model) and type(other) is base and not hasattr(base, "ahn_config")
    other.ahn_config = 1
    ahn.detach(model)
    assert type(model) is base and not hasattr(model, "ahn_config")
    with_memory(model)
    model.__class__ = type("FSDP" + base.__name__, (type(model),), {})  # as `fully_shard` does
    ahn.detach(model)
    assert isinstance(model, base) and not any(hasattr(model, f"ahn_{name}") for name in ("config", "names"))
    with_memory(model)
    assert model.ahn_config.window == handle_of(model).config.window


def test_augment_twice_and_detach_twice():
    model = with_memory(tiny())
    with pytest.raises(ConfigError, match="already"):
        ahn.augment(model)
    ahn.detach(model)
    with pytest.raises(ConfigError, match="no memories"):
        ahn.detach(model)
    with pytest.raises(ConfigError, match="no memories"):
        ahn.AHNCache(model)


def test_importing_patches_nothing():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    other = tiny(seed=4)
    ids = token_ids(30)
    with torch.no_grad():
        before = other(ids).logits
        with_memory(tiny())
        assert torch.equal(other(ids).logits, before)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"].__module__.startswith("transformers")


def test_only_the_cells_are_trained():
    model = with_memory(tiny())
    assert all(p.requires_grad == (".ahn." in name) for name, p in model.named_parameters())


def sliding_qwen():
    return tiny("Qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1)


@pytest.mark.parametrize(
    ("build", "missing"),
    [
        (sliding_qwen, "sliding_attention"),
        (lambda: tiny("Mistral", sliding_window=16), "slides over 16"),
        (lambda: tiny("Gemma2", head_dim=8, query_pre_attn_scalar=8), "sliding_attention"),
        (lambda: tiny("DeepseekV3", num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=1), "latent"),
        (lambda: tiny("GPTNeoX"), "self_attn"),
    ],
    ids=["sliding layers", "sliding base", "softcap", "mla", "no self_attn"],
)
def test_unsupported_models_say_what_is_missing(build, missing):
    model = build()
    with pytest.raises(UnsupportedModelError, match=missing):
        ahn.augment(model, ahn.AHNConfig(window=16, sinks=4))
    assert not hasattr(model, "ahn_config")
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_encoder_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        ahn.augment(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"window": -3}, "window=-3"),
        ({"window": 1.5}, "window=1.5"),
        ({"window": True}, "window=True"),
        ({"window": "64"}, "window='64'"),
        ({"sinks": -1}, "sinks=-1"),
        ({"sinks": 2.0}, "sinks=2.0"),
        ({"layers": ()}, "layers"),
        ({"layers": (0, 0)}, "distinct"),
        ({"layers": (-1,)}, "layers=-1"),
        ({"sink_positions": "far"}, "'far'.*clipped, absolute"),
        ({"memory_positions": "far"}, "'far'.*rope, none"),
        ({"feature_maps": 3}, "feature_maps=3.*0, 1, 2, 4"),
        ({"window_gate": 1}, "window_gate=1.*true or false"),
        ({"cell": "deltanets"}, "did you mean 'deltanet'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        ahn.AHNConfig(**settings)


def test_settings_under_their_old_names():
    found = ahn.AHNConfig(feature_maps=2, window_gate=True)
    values = found.to_dict()
    values["key_maps"], values["make_room"] = values.pop("feature_maps"), values.pop("window_gate")
    assert ahn.AHNConfig.from_dict(values) == found


def test_settings_that_do_not_fit_the_base():
    with pytest.raises(ConfigError, match="32768 tokens, more than the 512 positions"):
        ahn.augment(tiny())
    with pytest.raises(ConfigError, match="layers 0 to 1"):
        ahn.augment(tiny(), ahn.AHNConfig(window=16, sinks=4, layers=(5,)))


def test_config_json_round_trip():
    config = ahn.AHNConfig("mamba2", 100, 7, layers=[3, 1], sink_positions="absolute")
    assert ahn.AHNConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="version 7"):
        ahn.AHNConfig.from_dict(config.to_dict() | {"version": 7})
    with pytest.raises(ConfigError, match="unknown keys: windo"):
        ahn.AHNConfig.from_dict(config.to_dict() | {"windo": 7})


def longrope():
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32, **factors}
    return tiny("Phi3", rope_parameters=rope, original_max_position_embeddings=32)


def dynamic():
    return tiny(
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}, max_position_embeddings=32
    )


@pytest.mark.parametrize("build", [longrope, dynamic])
@pytest.mark.parametrize("positions", ["clipped", "absolute"])
def test_frequencies_that_change_with_the_length_are_held(build, positions):
    base, ids = build(), token_ids(110)
    with torch.no_grad():
        short, long = base(ids[:, :20]).logits, base(ids).logits
        with_memory(base, sink_positions=positions)
        whole = base(ids, use_cache=False).logits
        assert (whole[:, :20] - short).abs().max() < 1e-5
        assert (in_pieces(base, ids, [10] * 11) - whole).abs().max() < 1e-4
        ahn.detach(base)
        assert torch.equal(base(ids).logits, long)
    refused = pytest.raises(ConfigError, match="short texts up to 32 tokens|more than the 32 positions")
    with refused:
        with_memory(build(), window=40)
    with refused:
        set_window(with_memory(build()), 40, 4)


def test_nothing_grows_once_the_window_is_full(cell):
    """Every tensor of the cache is written in place: same storage, same size, however much is read or decoded."""
    model = with_memory(tiny(), cell)
    cache = ahn.read(model, token_ids(40))
    held = [t for layer in cache.layers for t in layer.tensors.values()]
    size, places = cache.nbytes, [t.data_ptr() for t in held]
    ahn.read(model, token_ids(300), cache, chunk=50)
    for _ in range(30):
        ahn.read(model, token_ids(1), cache)
    assert cache.nbytes == size
    assert [t.data_ptr() for layer in cache.layers for t in layer.tensors.values()] == places
    assert cache.tokens_seen == 370


def test_cache_size_is_sinks_window_gates_and_state(cell):
    model = with_memory(tiny(), cell)
    cache = ahn.read(model, token_ids(100))
    gates = ahn.cells.get(cell).num_gates * 4
    assert cache.nbytes == 2 * 4 * (20 * (2 * 2 * 8 + gates) + 4 * 8 * 8)


def test_a_short_text_takes_little():
    model = with_memory(tiny(), window=400)
    assert ahn.read(model, token_ids(10)).nbytes < ahn.read(model, token_ids(420)).nbytes / 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(cell, dtype):
    ids = token_ids(60)
    model = with_memory(tiny(), cell)
    expected = in_pieces(model, ids, [60])
    half = with_memory(tiny().to(dtype), cell)
    whole = in_pieces(half, ids, [60])
    assert whole.dtype == dtype
    assert (whole.float() - expected).norm() / expected.norm() < 0.05
    pieces = in_pieces(half, ids, [13, 1, 1, 30, 15])
    assert (pieces.float() - expected).norm() / expected.norm() < 0.05
    cache = ahn.read(half, ids)
    assert cache.layers[0].state.dtype == torch.float32
    assert cache.layers[0].keys.dtype == dtype


@pytest.mark.slow
def test_torch_compile():
    """Compiles with a break at each attention: the memory is Python and in place."""
    model = with_memory(tiny())
    ids = token_ids(60)
    expected = in_pieces(model, ids, [40, 1, 19])
    compiled = torch.compile(model, backend="aot_eager")
    cache, out = ahn.AHNCache(model), []
    with torch.no_grad():
        for piece in ids.split([40, 1, 19], 1):
            out.append(compiled(piece, **{PAST: cache}).logits)
    torch.testing.assert_close(torch.cat(out, 1), expected, atol=1e-4, rtol=0)
    torch._dynamo.reset()


def test_a_quantised_base(tmp_path):
    quanto = pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    from transformers import AutoModelForCausalLM, QuantoConfig

    assert quanto
    tiny().save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QuantoConfig(weights="int8")).eval()
    ids = token_ids(60)
    with torch.no_grad():
        expected = base(ids).logits
    model = with_memory(base)
    assert (in_pieces(model, ids, [60])[:, :20] - expected[:, :20]).abs().max() < 1e-5
    whole = in_pieces(model, ids, [60])
    assert (in_pieces(model, ids, [13, 1, 46]) - whole).abs().max() < 1e-4
    ahn.read(model, ids).save(tmp_path / "book.ahn")
    assert ahn.AHNCache.load(tmp_path / "book.ahn", model).tokens_seen == 60


def test_our_attention_needs_our_model():
    model = with_memory(tiny())
    other = tiny(seed=2)
    other.config._attn_implementation = model.config._attn_implementation
    with pytest.raises(AHNError, match=r"ahn\.augment"):
        other(token_ids(5))


def test_attention_dropout_is_refused():
    model = with_memory(tiny(attention_dropout=0.1)).train()
    with pytest.raises(ConfigError, match=r"attention_dropout=0\.1"):
        model(token_ids(30), use_cache=False)


def test_autocast():
    model = with_memory(tiny())
    ids = token_ids(60)
    expected = in_pieces(model, ids, [60])
    with torch.autocast("cpu", torch.bfloat16):
        for out in (in_pieces(model, ids, [20, 1, 39]), model(ids, use_cache=False).logits):
            assert (out.float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("mask", [(1, 59), (1, 61), (2, 60)])
def test_masks_of_another_size(mask):
    with pytest.raises(ConfigError, match=r"expected \[1, 60\]"):
        with_memory(tiny())(token_ids(60), attention_mask=torch.ones(mask, dtype=torch.long))


def test_what_is_no_model_or_no_config():
    with pytest.raises(UnsupportedModelError, match="Linear is no transformers model"):
        ahn.augment(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="expected an ahn.AHNConfig"):
        ahn.augment(tiny(), {"window": 5})


@pytest.mark.slow
def test_compiled_without_a_cache():
    model = with_memory(tiny())
    ids = token_ids(60)
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, atol=1e-4, rtol=0)
    torch._dynamo.reset()


def test_a_reset_cache_serves_another_batch():
    model = with_memory(tiny())
    cache = ahn.read(model, token_ids(60, batch=2))
    cache.reset()
    assert (cache.nbytes, cache.tokens_seen) == (0, 0)
    expected = ahn.read(model, token_ids(60, batch=3)).last_logits
    assert torch.equal(ahn.read(model, token_ids(60, batch=3), cache).last_logits, expected)
