"""A cache and a memory file know the model that they were read with: its weights, its scales, its adapters."""

import pytest
import torch

import ahn
from ahn.compat import PAST
from ahn.errors import ConfigError, MemoryFileError
from ahn.fingerprint import fingerprint
from conftest import tiny, token_ids, with_memory

GREEDY = {"max_new_tokens": 3, "do_sample": False}
of_peft = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it
CHANGED = "weights of the model have changed"


def adapted():
    """A model with a memory and two LoRA adapters, of which the first is active."""
    peft = pytest.importorskip("peft", reason="needs peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(with_memory(tiny()), config)
    model.add_adapter("two", config)
    return model.eval()


def first_lora(model):
    return model.get_base_model().model.layers[0].self_attn.q_proj


def disable(model):
    model.base_model.disable_adapter_layers()


def rescale(model):
    first_lora(model).scaling["default"] *= 2


SWITCHES = {
    "disabled": disable,
    "other": lambda model: model.set_adapter("two"),
    "both": lambda model: model.base_model.set_adapter(["default", "two"]),
    "scale": rescale,
    "merged": lambda model: model.merge_adapter(),
}


def goes_on(model, cache):
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    return [
        lambda: ahn.read(model, token_ids(3), cache),
        lambda: ahn.generate(model, token_ids(3), cache, **GREEDY),
        lambda: inner(token_ids(3), **{PAST: cache}),
        lambda: inner.generate(token_ids(63), **{PAST: cache}, **GREEDY),
    ]


@of_peft
@pytest.mark.parametrize("switch", SWITCHES)
def test_adapters_that_are_switched(tmp_path, switch):
    model = adapted()
    cache = ahn.read(model, token_ids(60))
    cache.save(tmp_path / "a.ahn")
    ahn.AHNCache.load(tmp_path / "a.ahn", model)
    SWITCHES[switch](model)
    for call in [*goes_on(model, cache), lambda: cache.save(tmp_path / "b.ahn")]:
        with pytest.raises(ConfigError, match=CHANGED):
            call()
    with pytest.raises(MemoryFileError, match="fingerprint"):
        ahn.AHNCache.load(tmp_path / "a.ahn", model)
    assert not (tmp_path / "b.ahn").exists()


@of_peft
def test_adapters_that_are_switched_back(tmp_path):
    model = adapted()
    cache = ahn.read(model, token_ids(60))
    cache.save(tmp_path / "a.ahn")
    with model.disable_adapter(), pytest.raises(ConfigError, match=CHANGED):
        ahn.read(model, token_ids(3), cache)
    with model.disable_adapter():
        ahn.read(model, token_ids(60)).save(tmp_path / "without.ahn")
    assert ahn.read(model, token_ids(3), cache).tokens_seen == 63
    assert ahn.AHNCache.load(tmp_path / "a.ahn", model).tokens_seen == 60
    with pytest.raises(MemoryFileError, match="fingerprint"):
        ahn.AHNCache.load(tmp_path / "without.ahn", model)


@of_peft
def test_files_from_before_adapters_were_compared(tmp_path, monkeypatch):
    model = adapted()
    with monkeypatch.context() as patch:
        patch.setattr("ahn.fingerprint.weights.adapters", lambda model: {})
        ahn.read(model, token_ids(60)).save(tmp_path / "a.ahn")
    assert ahn.AHNCache.load(tmp_path / "a.ahn", model).tokens_seen == 60


def negate(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(-1)


def load_others(model):
    model.load_state_dict(with_memory(tiny(seed=5)).state_dict())


def replace(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


def replace_data(model):
    up = model.model.layers[0].mlp.up_proj.weight
    up.data = -up.data


def round_all(model):
    model.to(torch.bfloat16).float()


def double_scale(model):
    model.model.layers[0].self_attn.scaling *= 2


CHANGES = [negate, load_others, replace, replace_data, round_all, double_scale]


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_that_is_changed(tmp_path, change):
    model = with_memory(tiny())
    cache = ahn.read(model, token_ids(60))
    change(model)
    for call in [*goes_on(model, cache), lambda: cache.fork().save(tmp_path / "a.ahn")]:
        with pytest.raises(ConfigError, match=CHANGED):
            call()
    assert not (tmp_path / "a.ahn").exists() and cache.tokens_seen == 60
    assert ahn.read(model, token_ids(60)).tokens_seen == 60


def negate_unseen(model):
    model.model.layers[0].mlp.up_proj.weight.data.mul_(-1)


@pytest.mark.parametrize("by", ["read", "call", "generate", "load", "fork"])
def test_a_change_that_no_counter_sees_is_not_saved(tmp_path, by):
    model, path = with_memory(tiny()), tmp_path / "a.ahn"
    cache = ahn.AHNCache(model)
    if by == "call":
        model(token_ids(60), **{PAST: cache})
    elif by == "generate":
        ahn.generate(model, token_ids(60), cache, **GREEDY)
    else:
        ahn.read(model, token_ids(60), cache)
    if by == "load":
        cache.save(path)
        cache = ahn.AHNCache.load(path, model)
    cache = cache.fork() if by == "fork" else cache
    negate_unseen(model)
    with pytest.raises(ConfigError, match=CHANGED):
        cache.save(tmp_path / "b.ahn")
    assert not (tmp_path / "b.ahn").exists()


@pytest.mark.parametrize("loaded", [False, True])
def test_one_number_after_a_file_is_known(tmp_path, loaded):
    """The fingerprint of the first file is that of all later ones."""
    model = with_memory(tiny())
    cache = ahn.read(model, token_ids(60))
    cache.save(tmp_path / "a.ahn")
    cache = ahn.AHNCache.load(tmp_path / "a.ahn", model) if loaded else cache
    model.model.layers[0].mlp.up_proj.weight.data[0, 1] += 1
    with pytest.raises(ConfigError, match=CHANGED):
        cache.save(tmp_path / "b.ahn")


def test_weights_that_only_moved(tmp_path):
    model = with_memory(tiny())
    cache = ahn.read(model, token_ids(60))
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert ahn.read(model, token_ids(3), cache).tokens_seen == 63
    cache.save(tmp_path / "a.ahn")
    assert ahn.AHNCache.load(tmp_path / "a.ahn", model).tokens_seen == 63


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Phi3", "Qwen2", "Qwen3", "Granite"])
def test_the_scale_of_the_scores_counts(family):
    model = with_memory(tiny(family))
    before = fingerprint(model)
    scale = model.model.layers[1].self_attn.scaling
    model.model.layers[1].self_attn.scaling = 2 * scale
    assert fingerprint(model) != before
    model.model.layers[1].self_attn.scaling = scale
    assert fingerprint(model) == before


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Phi3", "Qwen2", "Qwen3", "Granite"])
def test_usual_models_keep_their_fingerprint(family, monkeypatch):
    model = with_memory(tiny(family))
    before = fingerprint(model)
    monkeypatch.setattr("ahn.fingerprint._scales", lambda model: {})
    assert fingerprint(model) == before


@pytest.mark.parametrize("again", [False, True], ids=["detached", "augmented again"])
def test_a_cache_of_memories_that_were_taken_off(again):
    model = with_memory(tiny())
    config, cache = model.ahn_config, ahn.read(model, token_ids(60))
    ahn.detach(model)
    if again:
        ahn.augment(model, config)
    for ids in (token_ids(3), token_ids(63)):
        with pytest.raises(ConfigError, match="has no memories, or others"):
            model.generate(ids, **{PAST: cache}, **GREEDY)
    with pytest.raises(ConfigError, match="memories|another model"):
        model(token_ids(3), **{PAST: cache})
    assert torch.isfinite(model(token_ids(3)).logits).all()


def test_a_cache_on_a_model_that_never_had_memories():
    cache = ahn.read(with_memory(tiny()), token_ids(60))
    with pytest.raises(ConfigError, match="no memories"):
        tiny()(token_ids(3), **{PAST: cache})
