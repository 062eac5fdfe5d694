"""What each policy sees, holds and costs."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import ahn
from ahn import bases, stores
from ahn.compat import PAST
from ahn.cost import cost
from ahn.errors import AdapterError, ConfigError
from ahn.eval import policies
from ahn.eval.kept import Kept, Stored
from ahn.eval.policies import compressive
from ahn.ops.softmax import attend
from conftest import token_ids
from tiny_base import SINKS, WINDOW, write_base

LOSSLESS = SINKS + WINDOW
IDS = token_ids(150)[0].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def make(folder):
    base, adapter = folder

    def made(name, model=None, **changes):
        store = {"store": Stored("attention", 10, 3)} if name == "store" else {}
        kept = Kept(WINDOW, SINKS, adapter, **(store | changes))
        return policies.get(name)(base, kept, device="cpu", model=model)

    return made


def logits(policy, ids, sizes):
    """Logits [T, V] of reading `ids` in pieces of these sizes, the last one over and over."""
    cache, found, ids = policy.cache(), [], torch.tensor([ids])
    sizes = iter(sizes)
    size = 0
    while ids.shape[1]:
        size = next(sizes, size)
        with torch.no_grad():
            found.append(policy.model(ids[:, :size], **{PAST: cache}, use_cache=True).logits[0])
        ids = ids[:, size:]
    return torch.cat(found), cache


def test_names():
    assert {"ahn", "ahn-zeroed", "compressive-avg", "full", "rag", "rag-true", "recall", "window"} <= {
        *policies.names()
    }
    with pytest.raises(ConfigError, match="did you mean 'compressive-max'"):
        policies.get("compresive-max")


@pytest.mark.slow
@pytest.mark.parametrize("name", policies.names())
def test_pieces_do_not_matter(name, make):
    policy = make(name)
    whole, _ = logits(policy, IDS, [len(IDS)])
    for sizes in ([1], [40, 1], [5, 31, 7, 1, 2, 3, 50], [LOSSLESS, 3]):
        torch.testing.assert_close(logits(policy, IDS, sizes)[0], whole, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", policies.names())
def test_generate_and_losses_are_those_of_the_logits(name, make, monkeypatch):
    monkeypatch.setattr("ahn.eval.policies.base.CHUNK", 64)  # several in these texts
    policy = make(name)
    whole, _ = logits(policy, IDS, [len(IDS)])
    (losses,) = policy.losses([IDS])
    torch.testing.assert_close(losses, cross_entropy(whole[:-1], torch.tensor(IDS[1:]), reduction="none"))
    answer = policy.generate(IDS, 6)
    assert 0 < len(answer) <= 6
    again, _ = logits(policy, IDS + answer, [len(IDS)])
    assert answer == again[len(IDS) - 1 : -1].argmax(-1).tolist()


TEXTS = [IDS, IDS[3:90], token_ids(12)[0].tolist(), IDS[1:], token_ids(141)[0].tolist()]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [16, 512])
@pytest.mark.parametrize("name", policies.names())
def test_rows_of_a_batch_are_answered_as_alone(name, chunk, make, monkeypatch):
    """Whatever the others' lengths: whole chunks of padding, windows that are not full, and answers that end early."""
    monkeypatch.setattr("ahn.eval.policies.base.CHUNK", chunk)
    policy = make(name)
    limits = [9, 40, 5, 30, 40]
    policy.ends = {policy.generate(TEXTS[3], 12)[7]}
    alone = [policy.generate(text, limit) for text, limit in zip(TEXTS, limits, strict=True)]
    assert policy.answers(TEXTS, limits) == alone
    assert len(alone[3]) < 30 and len(set(map(len, alone))) > 2
    for found, text in zip(policy.losses(TEXTS), TEXTS, strict=True):
        torch.testing.assert_close(found, policy.losses([text])[0], atol=1e-4, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [16, 512])
@pytest.mark.parametrize("store", ["attention", "random", "recency", "surprise"])
def test_rows_of_a_batch_with_a_store(store, chunk, make, monkeypatch):
    """As above beside a memory: rows cross the store's grid at different steps."""
    monkeypatch.setattr("ahn.eval.policies.base.CHUNK", chunk)
    for name, grid in (("attention", 24), ("surprise", 16)):
        monkeypatch.setattr(stores.get(name), "grid", grid)
    policy = make("ahn", store=Stored(store, 10, 3))
    limits = [6, 20, 5, 12, 20]
    alone = [policy.generate(text, limit) for text, limit in zip(TEXTS, limits, strict=True)]
    assert policy.answers(TEXTS, limits) == alone
    for found, text in zip(policy.losses(TEXTS), TEXTS, strict=True):
        torch.testing.assert_close(found, policy.losses([text])[0], atol=1e-4, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", policies.names())
def test_a_released_base_is_the_plain_one(name, folder, make):
    base = bases.load_base(folder[0], device="cpu")
    with torch.no_grad():
        before = base(torch.tensor([IDS])).logits
    answer = make(name).generate(IDS, 6)
    policy = make(name, model=base, yarn=2.0 if name == "full" else None)
    assert policy.model is base and (name == "full" or policy.generate(IDS, 6) == answer)
    assert policy.release() is base
    with torch.no_grad():
        torch.testing.assert_close(base(torch.tensor([IDS])).logits, before)
    assert make(name, model=base).generate(IDS, 6) == answer


def test_the_end_token_ends_an_answer_and_is_not_part_of_it(make):
    policy = make("window")
    free = policy.generate(IDS, 6)
    policy.ends = {free[3]}
    assert policy.generate(IDS, 6) == free[: free.index(free[3])]


MEMORIES = [
    {},
    {"feature_maps": 1, "window_gate": True},
    {"feature_maps": 2},
    {"feature_maps": 4, "layers": (1,)},
    {"cell": "mamba2", "feature_maps": 2},
]


@pytest.mark.slow
@pytest.mark.parametrize("changes", MEMORIES, ids=str)
@pytest.mark.parametrize("name", ["window", "ahn", "ahn-zeroed", "compressive-max", "compressive-avg"])
def test_cache_bytes_are_those_held(name, changes, tmp_path):
    base, adapter = write_base(tmp_path, **changes)
    policy = policies.get(name)(base, Kept(WINDOW, SINKS, adapter), device="cpu")
    sizes = {length: logits(policy, IDS[:length], [length])[1].nbytes for length in (20, LOSSLESS, 100, 150)}
    assert sizes == {length: policy.cache_bytes(length) for length in sizes}
    assert (sizes[100] == sizes[150]) == ("layers" not in changes)
    assert policy.parameters_added == (sum(_added(policy)) if name.startswith("ahn") else 0)


def _added(policy):
    """Parameters of each layer's cell by the cost model."""
    config = policy.model.ahn_config
    table, layers = cost(policy.shape, 100, config).parameters, range(policy.shape.layers)
    a_layer = (table.memory - table.full) // policy.shape.layers
    if config.cell == "gated_deltanet":
        a_layer -= policy.shape.N  # the paper counts `D` of the authors' checkpoints, which has no effect
    return [a_layer for i in layers if config.layers is None or i in config.layers]


def test_full_holds_everything(make):
    policy = make("full")
    _, cache = logits(policy, IDS, [len(IDS)])
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert policy.cache_bytes(len(IDS)) == held
    assert policy.lossless is None and policy.context == 512


@pytest.mark.parametrize("name", ["compressive-max", "compressive-avg"])
def test_the_buffer_is_as_large_as_the_memory(name, make):
    ours, memory, window = (make(n).cache_bytes(150) for n in (name, "ahn", "window"))
    slot = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, size, bytes
    assert memory - slot < ours <= memory
    assert window < ours


def test_full_is_the_base(folder, make):
    base = bases.load_base(folder[0], device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(logits(make("full"), IDS, [50])[0], base(torch.tensor([IDS])).logits[0])


def test_zeroed_reads_are_the_window_alone_and_the_memory_is_not(make):
    window, zeroed, memory = (logits(make(name), IDS, [64, 1])[0] for name in ("window", "ahn-zeroed", "ahn"))
    torch.testing.assert_close(zeroed, window, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(memory[LOSSLESS + 1 :], window[LOSSLESS + 1 :], atol=1e-2)
    torch.testing.assert_close(memory[:LOSSLESS], window[:LOSSLESS])


@pytest.mark.parametrize("maximum", [True, False])
@pytest.mark.parametrize("slots", [3, 100])
def test_pooled_attention_by_hand(maximum, slots):
    """One query after the other over what the definition says is in the buffer."""
    tokens, size = 27, 4
    g = torch.Generator().manual_seed(0)
    k, v, q = (torch.randn(1, 2, tokens, size, generator=g) for _ in range(3))

    def pool(x):
        return x.amax(2) if maximum else x.mean(2)

    for sizes in ([27], [1] * 27, [2, 3, 9, 13], [10, 1, 1, 15]):
        memory = compressive.CompressiveMemory(window=1, sinks=0, slots=slots, maximum=maximum)
        memory.reserve(10, k, None)
        seen, found = 0, []
        for count in sizes:
            part = slice(seen, seen + count)
            numbers = torch.arange(seen, seen + count)[None]
            keys, values, mask = memory.absorb(k[:, :, part], v[:, :, part], numbers, numbers >= 0)
            found.append(attend(q[:, :, part], keys, values, mask, 0.5)[0])
            seen += count
        found = torch.cat(found, 2)
        for i in range(tokens):
            starts = range(0, i + 1, 4)[-slots:]
            keys, values = (torch.stack([pool(t[:, :, s : min(s + 4, i + 1)]) for s in starts], 2) for t in (k, v))
            weights = (q[:, :, i : i + 1] @ keys.mT * 0.5).softmax(-1)
            torch.testing.assert_close(found[:, :, i : i + 1], weights @ values, atol=1e-5, rtol=1e-5)


def test_a_pooled_token_is_seen(make):
    """A change of a token that has left the window changes the answer, until its slot is taken."""
    policy = make("compressive-avg")
    reach = 4 * policy.slots + LOSSLESS
    ids = token_ids(reach + 60)[0].tolist()
    other = [*ids[:20], 3 + (ids[20] - 2) % 100, *ids[21:]]
    one, two = (logits(policy, x, [64])[0] for x in (ids, other))
    # two layers: what one has seen may reach the next, so only the first of it is certain
    assert not torch.allclose(one[20 + WINDOW + 8], two[20 + WINDOW + 8], atol=1e-4)


def test_full_refuses_what_is_longer_than_its_positions(folder):
    config, full = bases.base_config(folder[0]), policies.get("full")
    full.check(config, 512, Kept(WINDOW, SINKS))
    with pytest.raises(ConfigError, match="513 tokens.*512 positions.*--yarn 1.5"):
        full.check(config, 513, Kept(WINDOW, SINKS))
    full.check(config, 1024, Kept(WINDOW, SINKS, yarn=2))
    with pytest.raises(ConfigError, match="1,024 positions"):
        full.check(config, 1025, Kept(WINDOW, SINKS, yarn=2))
    policies.get("window").check(config, 100_000, Kept(WINDOW, SINKS))


def test_full_refuses_positions_that_change_within_a_text():
    from transformers import Phi3Config

    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0}
    rope |= {"original_max_position_embeddings": 128}
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 512}
    config = Phi3Config(**shape, original_max_position_embeddings=128, rope_parameters=rope, pad_token_id=0)
    full = policies.get("full")
    full.check(config, 128, Kept(WINDOW, SINKS))
    with pytest.raises(ConfigError, match="129 tokens.*from 128 on"):
        full.check(config, 129, Kept(WINDOW, SINKS))


def test_yarn_is_that_of_transformers(folder, make):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder[0])
    config.rope_parameters = config.rope_parameters | {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 512,
    }
    theirs = AutoModelForCausalLM.from_pretrained(folder[0], config=config).eval()
    ours = make("full", yarn=2.0)
    assert ours.context == 1024
    with torch.no_grad():
        wanted = theirs(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(logits(ours, IDS, [50])[0], wanted)
    assert not torch.allclose(wanted, logits(make("full"), IDS, [50])[0], atol=1e-2)


def test_bad_input_before_any_weights(folder, tmp_path):
    config = bases.base_config(folder[0])
    with pytest.raises(ConfigError, match="policy ahn needs an adapter"):
        policies.get("ahn").check(config, 10, Kept(WINDOW, SINKS))
    with pytest.raises(ConfigError, match="sinks \\+ window"):
        policies.get("window").check(config, 10, Kept(600, SINKS))
    with pytest.raises(AdapterError):
        policies.get("ahn").check(config, 10, Kept(WINDOW, SINKS, adapter=str(tmp_path)))
    with pytest.raises(AdapterError, match="another base"):
        policies.get("ahn").check(config, 10, Kept(WINDOW, SINKS, adapter="smollm2-135m-deltanet"))


def test_settings_say_what_the_numbers_depend_on(folder):
    _, adapter = folder
    asked = Kept(24, 8, adapter, 2.0, Stored("random", 9))
    found = {n: policies.get(n).settings(asked) for n in policies.names()}
    assert found["ahn"]["store"] == found["store"]["store"] == {"name": "random", "size": 9, "span": 1}
    assert "store" not in found["window"]
    assert found["full"] == {"yarn": 2.0}
    assert "adapter_digest" not in found["window"] and len(found["ahn"]["adapter_digest"]) == 16
    assert found["compressive-max"]["sized_like"] == "gated_deltanet"


def test_flops_and_parameters(make):
    full, window, memory, pooled = (make(n) for n in ("full", "window", "ahn", "compressive-max"))
    for i in (0, 1):
        assert window.flops(150)[i] < pooled.flops(150)[i] < full.flops(150)[i]
        assert window.flops(150)[i] < memory.flops(150)[i]
    assert window.parameters_added == 0 < memory.parameters_added
    config = memory.model.ahn_config
    assert config == ahn.AHNConfig("gated_deltanet", WINDOW, SINKS)


@pytest.mark.parametrize("store", [Stored("recency", 10), Stored("surprise", 12, 4)], ids=str)
def test_a_store_takes_its_places_from_the_window(store, make):
    """As many lossless tokens with and without, and the bytes that are counted are those that are held."""
    with_store, without = make("ahn", store=store), make("ahn")
    config = with_store.model.ahn_config
    assert config.lossless == without.model.ahn_config.lossless and config.store_size == store.size
    for policy in (with_store, make("store", store=Stored("recency", 10))):
        _, cache = logits(policy, IDS, [50])
        assert cache.nbytes == policy.cache_bytes(len(IDS))
    assert with_store.flops(150) == without.flops(150)


def test_a_store_needs_room_and_a_name(make):
    with pytest.raises(ConfigError, match="leaves no window"):
        make("ahn", store=Stored("recency", WINDOW))
    with pytest.raises(ConfigError, match="expected --store with one of"):
        make("store", store=None)
    with pytest.raises(ConfigError, match="needs the gates of an adapter"):
        make("store", store=Stored("learned", 8))
    with pytest.raises(AdapterError, match="its gates are part of an adapter, and .* has none"):
        make("ahn", store=Stored("learned", 8))
