"""Invalid inputs of the library: ids, masks, caches and models that do not go together."""

import numpy as np
import pytest
import torch
from transformers import BatchEncoding, DynamicCache

import ahn
from ahn.compat import PAST
from ahn.errors import AHNError, ConfigError, UnsupportedModelError
from ahn.memory.handle import layers_of
from conftest import tiny, token_ids, with_memory

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 6}


@pytest.fixture
def model():
    return with_memory(tiny())


def read(model, ids):
    return ahn.read(model, ids).last_logits


def generate(model, ids):
    return ahn.generate(model, ids, ahn.read(model, token_ids(30)), **GREEDY)


@torch.no_grad()
def forward(model, ids):
    return model(torch.as_tensor(ids)[None], use_cache=False).logits


@pytest.mark.parametrize("door", [read, generate])
def test_ids_of_every_form(model, door):
    ids = token_ids(10)
    expected = door(model, ids)
    for form in (
        ids[0],
        ids[0].tolist(),
        ids.tolist(),
        tuple(ids[0].tolist()),
        ids.numpy(),
        ids.to(torch.uint8),
        ids.numpy().astype(np.uint16),
        ids.int(),
        {"input_ids": ids},
        BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)}),
        BatchEncoding({"input_ids": ids[0].tolist(), "attention_mask": [1] * 10}),
    ):
        assert torch.equal(door(model, form), expected), type(form)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_integers_of_every_size(model, dtype):
    ids = token_ids(10)[0]
    assert torch.equal(forward(model, ids.to(dtype)), forward(model, ids))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("Who sat?", r"'Who sat\?': expected token ids, as tokenizer"),
        (b"Who", "expected token ids"),
        ([[3, 4, 5], [3]], "rows of one length"),
        (["Who", "sat"], "expected integers"),
        (None, "NoneType: expected integers"),
        ({"ids": [3]}, "expected 'input_ids'"),
        ([3.5, 4.0], "float32: expected"),
        ([True, False], "bool: expected"),
        ([3, 128], "token id 128: expected 0 to 127"),
        ([3, -1], "token id -1: expected 0 to 127"),
        ([2**70], "expected integers"),
        (3, "at least one token id"),
        ([], "at least one token id"),
    ],
    ids=str,
)
@pytest.mark.parametrize("door", [read, generate])
def test_ids_that_are_none(model, door, ids, message):
    with pytest.raises(ConfigError, match=message):
        door(model, ids)


def odd_forms():
    """Tensors whose numbers are not there, or not one behind the other."""
    ones = torch.ones(2, 3, dtype=torch.long)
    parts = [ones[0], ones[0, :2]]
    return {
        "on the meta device": ones.to("meta"),
        "sparse": ones.to_sparse(),
        "nested": torch.nested.nested_tensor(parts),
        "nested ": torch.nested.nested_tensor(parts, layout=torch.jagged),
        "quantised": torch.quantize_per_tensor(ones.float(), 1.0, 0, torch.quint8),
    }


@pytest.mark.filterwarnings("ignore::UserWarning")  # nested tensors are a prototype, quantised ones deprecated
@pytest.mark.parametrize("form", ["on the meta device", "sparse", "nested", "nested ", "quantised"])
def test_tensors_of_odd_forms(model, form):
    tensor = odd_forms()[form]
    for door in (read, generate):
        with pytest.raises(ConfigError, match=f"ids as a tensor that is {form.strip()}: expected"):
            door(model, tensor)
        with pytest.raises(ConfigError, match=f"attention_mask as a tensor that is {form.strip()}: expected"):
            door(model, {"input_ids": token_ids(6, batch=2), "attention_mask": tensor})


@pytest.mark.parametrize("count", [0, -1, "a", 1.5, True, float("nan")])
def test_numbers_of_new_tokens_that_are_none(model, count):
    cache = ahn.read(model, token_ids(30))
    with pytest.raises(ConfigError, match=f"max_new_tokens={count!r}: expected an integer of at least 1"):
        ahn.generate(model, token_ids(3), cache, max_new_tokens=count)
    assert cache.tokens_seen == 30
    assert ahn.generate(model, token_ids(3), cache, **GREEDY | {"max_new_tokens": np.int64(2)}).shape == (1, 2)


@pytest.mark.parametrize("ids", [[3, 128], [3, -1], [3.5, 4.0], [True, False], []], ids=str)
def test_ids_that_are_none_for_the_model_itself(model, ids):
    with pytest.raises(ConfigError, match="expected"):
        forward(model, ids)


@pytest.mark.parametrize("cache", [DynamicCache(), "book.ahn", {}], ids=["DynamicCache", "str", "dict"])
def test_what_is_no_cache(model, cache):
    with pytest.raises(ConfigError, match=r"expected an ahn\.AHNCache"):
        ahn.read(model, token_ids(3), cache)
    with pytest.raises(ConfigError, match=r"expected an ahn\.AHNCache"):
        ahn.generate(model, token_ids(3), cache, **GREEDY)


@pytest.mark.parametrize("path", [None, 3, b"book.ahn"])
def test_what_is_no_path(model, path):
    with pytest.raises(ConfigError, match="expected the name of a memory file"):
        ahn.AHNCache.load(path, model)
    with pytest.raises(ConfigError, match="expected the name of a memory file"):
        ahn.read(model, token_ids(3)).save(path)


def test_a_model_without_memories():
    for door in (read, generate):
        with pytest.raises(ConfigError, match=r"ahn\.augment"):
            door(tiny(), token_ids(3))


def test_padding_in_front_of_a_question(model):
    """Given as a mask, or by the tokenizer: each row answers as it does alone."""
    book, short, long = token_ids(40, seed=1), token_ids(3, seed=2), token_ids(9, seed=3)
    ids = torch.cat([torch.cat([torch.zeros(1, 6, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    alone = torch.cat([ahn.generate(model, one, ahn.read(model, book), **GREEDY) for one in (short, long)])
    cache = ahn.read(model, book)
    assert torch.equal(ahn.generate(model, ids, cache.fork(), attention_mask=mask, **GREEDY), alone)
    assert torch.equal(ahn.generate(model, ids, cache.fork(), attention_mask=mask.bool().tolist(), **GREEDY), alone)
    encoded = BatchEncoding({"input_ids": ids, "attention_mask": mask})
    assert torch.equal(ahn.generate(model, encoded, cache.fork(), **GREEDY), alone)
    with pytest.raises(ConfigError, match="ends with padding"):
        ahn.generate(model, ids, cache, attention_mask=mask.flip(1), **GREEDY)
    with pytest.raises(ConfigError, match=r"attention_mask of shape \[2, 8\]: expected \[2, 9\]"):
        ahn.generate(model, ids, cache, attention_mask=mask[:, 1:], **GREEDY)
    assert torch.equal(ahn.generate(model, ids, cache, attention_mask=mask, **GREEDY), alone)


def test_a_turn_after_beam_search(model):
    """The memory has read the answer that was found, whichever beam that was."""
    book, first, second = token_ids(40, seed=1), token_ids(5, seed=2), token_ids(4, seed=3)
    cache = ahn.read(model, book)
    answer = ahn.generate(model, first, cache, num_beams=3, **GREEDY)
    whole = torch.cat([book, first, answer[:, :-1]], 1)
    assert cache.tokens_seen == whole.shape[1] and cache.batch_size == 1
    turn = torch.cat([answer[:, -1:], second], 1)
    again = ahn.generate(model, turn, ahn.read(model, whole), **GREEDY)
    assert torch.equal(ahn.generate(model, turn, cache, **GREEDY), again)


def test_another_number_of_rows(model):
    cache = ahn.read(model, token_ids(30, batch=2))
    for call in (lambda: ahn.read(model, token_ids(3), cache), lambda: ahn.generate(model, [3], cache, **GREEDY)):
        with pytest.raises(ConfigError, match="batch of 1 on a cache of 2 rows: expected 2"):
            call()


# Models and caches that do not go together.
@pytest.mark.parametrize("other", ["sdpa", "eager"])
def test_another_attention_is_refused(model, other):
    ids = token_ids(40)
    expected = generate(model, ids)
    model.set_attn_implementation(other)
    for call in (lambda: generate(model, ids), lambda: model.generate(ids, **GREEDY), lambda: forward(model, ids[0])):
        with pytest.raises(ConfigError, match=f"attention '{other}' has been set.*detach"):
            call()
    model.set_attn_implementation("ahn")
    assert torch.equal(generate(model, ids), expected)
    ahn.detach(model).set_attn_implementation(other)
    assert model.generate(ids, **GREEDY).shape == (1, 46)


def goes_on(model, cache, tmp_path):
    """Every way to go on with a cache."""
    return [
        lambda: ahn.read(model, token_ids(3), cache),
        lambda: ahn.generate(model, token_ids(3), cache, **GREEDY),
        lambda: model(token_ids(3), **{PAST: cache}),
        lambda: model.generate(token_ids(33), **{PAST: cache}, **GREEDY),
    ]


def test_a_cache_of_other_weights(model, tmp_path):
    ahn.save_adapter(with_memory(tiny(), seed=7), tmp_path / "b")
    cache = ahn.read(model, token_ids(30))
    ahn.load_adapter(model, tmp_path / "b")
    for call in [*goes_on(model, cache, tmp_path), lambda: cache.save(tmp_path / "a.ahn")]:
        with pytest.raises(ConfigError, match="weights of the model have changed"):
            call()
    assert not (tmp_path / "a.ahn").exists()
    ahn.read(model, token_ids(30)).save(tmp_path / "b.ahn")


def test_weights_that_are_changed_in_place(model, tmp_path):
    cache, other = ahn.read(model, token_ids(30)), with_memory(tiny(), seed=7)
    model.load_state_dict(other.state_dict())
    for call in [*goes_on(model, cache, tmp_path)[:2], lambda: cache.save(tmp_path / "a.ahn")]:
        with pytest.raises(ConfigError, match="weights of the model have changed"):
            call()


def test_a_cache_of_another_precision(model, tmp_path):
    model.to(torch.bfloat16).float()  # now nothing is lost on the way there and back
    cache = ahn.read(model, token_ids(30))
    model.to(torch.bfloat16)
    for call in [*goes_on(model, cache, tmp_path), lambda: cache.save(tmp_path / "a.ahn")]:
        with pytest.raises(ConfigError, match=r"model is in torch\.bfloat16, the cache was made in torch\.float32"):
            call()
    assert not (tmp_path / "a.ahn").exists()
    model.float()
    ahn.read(model, token_ids(3), cache)


def test_a_cache_of_another_model(model, tmp_path):
    cache = ahn.read(with_memory(tiny(seed=5), seed=6), token_ids(30))
    for call in goes_on(model, cache, tmp_path):
        with pytest.raises(ConfigError, match="made for another model"):
            call()


def test_a_cache_whose_model_was_detached(model, tmp_path):
    cache = ahn.read(model, token_ids(30))
    config = model.ahn_config
    ahn.detach(model)
    with pytest.raises(ConfigError, match="no memories"):
        cache.save(tmp_path / "a.ahn")
    ahn.augment(model, config)
    with pytest.raises(AHNError, match="another model"):
        ahn.read(model, token_ids(3), cache)


def twins():
    """Two models that were made with one config object."""
    one = tiny()
    other = type(one)(one.config).eval()
    other.load_state_dict(one.state_dict())
    assert one.config is other.config
    return one, other


def test_models_that_share_a_config():
    """Memories of one leave the other alone, whichever is detached first."""
    ids = token_ids(60)[0]
    plain = forward(tiny(), ids)
    one, other = twins()
    ahn.augment(one, ahn.AHNConfig(window=16, sinks=4))
    remembering = forward(one, ids)
    assert torch.equal(forward(other, ids), plain) and not torch.equal(remembering, plain)
    ahn.augment(other, ahn.AHNConfig(window=16, sinks=4))
    ahn.detach(one)
    assert torch.equal(forward(one, ids), plain)
    assert torch.equal(forward(other, ids), remembering)
    ahn.detach(other)
    assert torch.equal(forward(other, ids), plain)


# Weights that are elsewhere, or are other layers.
def test_a_base_without_layers():
    with pytest.raises(UnsupportedModelError, match=r"num_hidden_layers=0\): expected at least 1"):
        ahn.augment(tiny(num_hidden_layers=0))


def test_an_offloaded_base():
    accelerate = pytest.importorskip("accelerate")
    base = accelerate.cpu_offload(tiny(), execution_device="cpu")
    with pytest.raises(UnsupportedModelError, match="offloaded"):
        ahn.augment(base, ahn.AHNConfig(window=16, sinks=4))


def test_offloaded_after_augment(model, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    cache = ahn.read(model, token_ids(30))
    accelerate.disk_offload(model, tmp_path / "weights", execution_device="cpu")
    for call in [*goes_on(model, cache, tmp_path), lambda: ahn.AHNCache(model), lambda: forward(model, [3, 4])]:
        with pytest.raises(UnsupportedModelError, match="offloaded"):
            call()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_that_torch_cannot_multiply(dtype):
    with pytest.raises(UnsupportedModelError, match=f"weights of {dtype}"):
        ahn.augment(tiny().to(dtype), ahn.AHNConfig(window=16, sinks=4))


of_peft = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it


def lora(model, **options):
    peft = pytest.importorskip("peft", reason="needs peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **options))


@of_peft
def test_a_model_of_peft(tmp_path):
    torch.manual_seed(0)
    config = ahn.AHNConfig("deltanet", 16, 4)
    model, ids = lora(tiny(), target_modules=["q_proj", "o_proj"]), token_ids(40)
    assert ahn.augment(model, config) is model and model.ahn_config == config
    inner = model.get_base_model()
    assert len(layers_of(model)) == 2
    answer = ahn.generate(model, ids, ahn.AHNCache(model), **GREEDY)
    assert torch.equal(answer, inner.generate(ids, **GREEDY)[:, 40:])
    assert torch.equal(answer, model.generate(input_ids=ids, **GREEDY)[:, 40:])
    cache = ahn.read(model, ids)
    cache.save(tmp_path / "a.ahn")
    assert torch.equal(ahn.AHNCache.load(tmp_path / "a.ahn", model).last_logits, cache.last_logits)
    ahn.save_adapter(model, tmp_path / "cells")
    ahn.load_adapter(model, tmp_path / "cells")
    assert ahn.detach(model) is model and not hasattr(model, "ahn_config")


@of_peft
@pytest.mark.parametrize("target", ["all-linear", ["o_proj"]], ids=str)
def test_adapters_of_peft_beside_the_memory(target):
    """They stay on the base, or nothing is computed with them."""
    ids = token_ids(40)
    model = with_memory(tiny())
    apart = lora(model, target_modules=target, exclude_modules=r".*\.ahn\..*")
    assert ahn.read(apart, ids).tokens_seen == 40
    with pytest.raises(ValueError, match="exclude_modules"):  # of ours, or peft's own
        ahn.read(lora(with_memory(tiny()), target_modules=target), ids)


def test_the_config_is_the_bases_again(tmp_path):
    """It says that inputs have no limit only while there are memories, and never in a folder."""
    before, model = tiny().config.to_dict(), with_memory(tiny())
    assert model.config.n_positions > model.config.max_position_embeddings
    model.save_pretrained(tmp_path)
    assert "n_positions" not in (tmp_path / "config.json").read_text()
    assert model.config.n_positions > model.config.max_position_embeddings
    assert "n_positions" not in ahn.detach(model).config.to_dict()
    assert ahn.detach(with_memory(tiny())).config.to_dict() == before


def test_errors_are_one_line():
    assert str(ConfigError("one\r\ntwo\x85three")) == "one two three"
