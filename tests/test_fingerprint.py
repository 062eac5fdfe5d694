"""The fingerprint of a model: whatever changes the logits changes it, and nothing else does."""

from copy import deepcopy

import pytest
import torch

import ahn
from ahn.bases import load_base
from ahn.errors import ConfigError, MemoryFileError
from ahn.fingerprint import WORDS, fingerprint, sampled
from conftest import tiny, token_ids, with_memory

FAMILIES = ["Llama", "Mistral", "Phi3", "Qwen2", "Qwen3"]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", [{}, {"rope_parameters": YARN}, {"tie_word_embeddings": True}])
def test_saved_and_loaded_is_the_same(tmp_path, family, changes):
    if family == "Phi3" and changes.get("rope_parameters"):
        pytest.skip("has no YaRN")
    model = tiny(family, **deepcopy(changes))  # a config may write into what it is given
    expected = fingerprint(model)
    model.save_pretrained(tmp_path)
    loaded = load_base(tmp_path, device="cpu")
    assert fingerprint(loaded) == expected
    loaded.save_pretrained(tmp_path / "again")
    assert fingerprint(load_base(tmp_path / "again", device="cpu")) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": YARN},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {"rms_norm_eps": 1e-3},
        {"hidden_act": "gelu"},
        {"num_key_value_heads": 4, "num_attention_heads": 8, "head_dim": 4},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
    ],
)
def test_settings_that_change_the_logits(changes):
    assert fingerprint(tiny(**deepcopy(changes))) != fingerprint(tiny())


def test_multipliers_of_a_family():
    assert fingerprint(tiny("Granite", logits_scaling=2.0)) != fingerprint(tiny("Granite"))


@pytest.mark.parametrize(
    "changes",
    [
        {"pad_token_id": 5},
        {"use_cache": False},
        {"attention_dropout": 0.1},
        {"initializer_range": 0.5},
        {"max_position_embeddings": 1024},
    ],
)
def test_settings_that_do_not(changes):
    model = tiny()
    for name, value in changes.items():
        setattr(model.config, name, value)
    assert fingerprint(model) == fingerprint(tiny())


def test_every_weight_counts():
    model = with_memory(tiny())
    before, generator = fingerprint(model), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        numbers = parameter.data.view(-1)
        at = int(torch.randint(len(numbers), (), generator=generator))
        kept = numbers[at].clone()
        numbers[at] = torch.nextafter(kept, kept + 1)
        assert fingerprint(model) != before, name
        numbers[at] = kept
    assert fingerprint(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("count", [1, 7, 8 * WORDS + 5, 20 * WORDS])
def test_changes_of_many_numbers(dtype, count):
    def sums(tensor):
        model = tiny()
        model.extra = torch.nn.Parameter(tensor, requires_grad=False)
        return fingerprint(model)

    numbers = torch.randn(count, generator=torch.Generator().manual_seed(1))
    negated = numbers.clone()
    negated[: max(1, count * 3 // 4)] *= -1
    variants = [numbers, negated]
    if count > 2:
        pair = numbers.clone()
        pair[1:3] *= -1
        variants += [-numbers, numbers.roll(1), numbers.flip(0), pair]
    variants = [variant.to(dtype) for variant in variants]
    complement = (~variants[0].view(torch.uint8)).view(dtype)
    assert len({sums(variant) for variant in [*variants, complement]}) == len(variants) + 1


@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_how_much_is_done_at_once_does_not_matter(monkeypatch, at_once):
    model = tiny(vocab_size=5 * WORDS // 16 + 3)
    expected = fingerprint(model)
    monkeypatch.setattr("ahn.fingerprint.AT_ONCE", at_once * WORDS)
    assert fingerprint(model) == expected


def test_buffers_that_are_saved_count():
    models = []
    for value in (0.0, 1.0):
        model = tiny()
        model.register_buffer("scale", torch.full((3,), value))
        model.register_buffer("scratch", torch.randn(3), persistent=False)
        models.append(fingerprint(model))
    assert models[0] != models[1]
    assert fingerprint(tiny()) == fingerprint(tiny())


def test_nothing_is_remembered():
    model = tiny()
    before = fingerprint(model)
    model.model.embed_tokens.weight.data.neg_()  # no version counter sees this
    assert fingerprint(model) != before


def test_views_and_odd_places_in_memory():
    whole = torch.randn(33)
    prints = set()
    for tensor in (whole[1:], whole[1:].clone(), whole[1:].reshape(4, 8).t().contiguous().t().reshape(-1)):
        model = tiny()
        model.extra = torch.nn.Parameter(tensor, requires_grad=False)
        prints.add(fingerprint(model))
    assert len(prints) == 1


def test_offloaded_weights_are_refused():
    model = tiny()
    model.model.layers[1].to("meta")
    with pytest.raises(ConfigError, match=r"model.layers.1.*offloaded"):
        fingerprint(model)


def saved(model, path):
    cache = ahn.read(model, token_ids(60))
    cache.save(path)
    return path


@pytest.mark.parametrize("change", ["yarn", "negated"])
def test_a_memory_of_a_model_that_computes_otherwise_is_refused(tmp_path, change):
    path = saved(with_memory(tiny()), tmp_path / "a.ahn")
    other = tiny(rope_parameters=dict(YARN)) if change == "yarn" else tiny()
    if change == "negated":
        rows = other.model.embed_tokens.weight.data
        rows.view(-1)[torch.arange(rows.numel()) % 4 > 0] *= -1
    with pytest.raises(MemoryFileError, match=r"memory of another model.*fingerprint"):
        ahn.AHNCache.load(path, with_memory(other))


def test_memories_with_the_first_fingerprint_are_still_read(tmp_path, monkeypatch):
    model = with_memory(tiny())
    with monkeypatch.context() as patch:
        patch.setattr("ahn.fingerprint.fingerprint", sampled)
        path = saved(model, tmp_path / "a.ahn")
    assert ahn.AHNCache.load(path, model).tokens_seen == 60
    other = with_memory(tiny(seed=5))
    with pytest.raises(MemoryFileError, match="fingerprint"):
        ahn.AHNCache.load(path, other)


@pytest.mark.parametrize("change", ["base", "memory", "replaced"])
def test_a_memory_is_not_saved_under_other_weights(tmp_path, change):
    model = with_memory(tiny())
    cache = ahn.read(model, token_ids(60))
    cache.save(tmp_path / "a.ahn")
    before = (tmp_path / "a.ahn").read_bytes()
    with torch.no_grad():
        if change == "base":
            model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
        elif change == "memory":
            next(model.model.layers[0].self_attn.ahn.cell.parameters()).add_(1)
        else:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    with pytest.raises(ConfigError, match="weights of the model have changed"):
        cache.fork().save(tmp_path / "a.ahn")
    assert (tmp_path / "a.ahn").read_bytes() == before
