"""One model in many threads: each call gets the tokens it would get alone, and a cache serves one call at a time."""

import copy
import pickle
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import ahn
from ahn.compat import PAST
from ahn.engine import graph as decoding
from ahn.errors import AHNError, ConfigError, UnsupportedOperationError
from ahn.hf.hooks import full_attention
from ahn.ops import dispatch
from ahn.ops.dispatch import Kernel
from conftest import storing, tiny, token_ids, with_memory

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
THREADS, CALLS = 8, 200


@pytest.fixture
def graph(monkeypatch):
    """Steps as on CUDA, but for the capture."""
    monkeypatch.setattr(dispatch, "pick_decoding", lambda device: Kernel("graph", "as on CUDA"))
    monkeypatch.setattr(decoding, "ROOM", 8)


def alike(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-4)


def jobs(model, masters, calls):
    """So many calls: reads, answers of this package's loop and of transformers', one forward, on forks."""

    def job(number):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(3, 128, (1, 2 + number % 30), generator=generator).to(model.device)
        cache = masters[number % len(masters)].fork()
        if number % 4 == 0:
            return ahn.read(model, ids, cache, chunk=7).last_logits.argmax(-1).tolist()
        if number % 4 == 1:
            return ahn.generate(model, ids, cache, max_new_tokens=6, **GREEDY).tolist()
        if number % 4 == 2:
            seen = torch.ones(1, cache.tokens_seen + ids.shape[1], dtype=torch.long, device=model.device)
            return model.generate(ids, attention_mask=seen, **{PAST: cache}, max_new_tokens=6, **GREEDY).tolist()
        with torch.no_grad():
            return model(ids, use_cache=number % 8 == 3).logits.argmax(-1).tolist()

    return [lambda number=number: job(number) for number in range(calls)]


def agree(model, calls=CALLS):
    masters = [ahn.read(model, token_ids(length, seed=length).to(model.device)) for length in (5, 30, 60)]
    work = jobs(model, masters, calls)
    alone = [call() for call in work]
    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(lambda call: call(), work)) == alone


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cell", "store"])
def test_threads(kind):
    agree(with_memory(tiny()) if kind == "cell" else storing("surprise"), CALLS if kind == "cell" else CALLS // 4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cell", "store"])
def test_threads_with_a_graph(graph, kind):
    """Its buffers are lent to one cache after the other."""
    agree(with_memory(tiny()) if kind == "cell" else storing("surprise"), CALLS // 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", ["cell", "store"])
def test_threads_on_cuda(kind):
    base = tiny(head_dim=16).cuda()
    model = with_memory(base) if kind == "cell" else storing("surprise", base=base)
    agree(model)
    assert model._ahn.graph is not None


def interleaved(model, first, second):
    """Both calls in threads, such that the first one is in its layer 1 while all of the second runs: their results."""
    entered, done = threading.Event(), threading.Event()

    def wait(*args):
        if threading.current_thread() is slow and not done.is_set():
            entered.set()
            assert done.wait(60)

    results = {}

    def keep(name, call):
        try:
            results[name] = call()
        except AHNError as error:
            results[name] = error

    def second_one():
        assert entered.wait(60)
        keep("second", second)
        done.set()

    hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(wait)
    slow, fast = threading.Thread(target=keep, args=("first", first)), threading.Thread(target=second_one)
    for thread in (slow, fast):
        thread.start()
    for thread in (slow, fast):
        thread.join()
    hook.remove()
    return results["first"], results["second"]


@torch.no_grad()
def test_a_call_in_the_middle_of_another():
    model = with_memory(tiny())
    ids, other = token_ids(40, seed=1), token_ids(40, seed=2)
    caches = [ahn.read(model, text[:, :30]) for text in (ids, other)]

    def call(cache, text):
        return lambda: model(text[:, 30:], **{PAST: cache}).logits

    alone = [call(cache.fork(), text)() for cache, text in zip(caches, (ids, other), strict=True)]
    found = interleaved(model, call(caches[0], ids), call(caches[1], other))
    assert all(alike(a, b) for a, b in zip(alone, found, strict=True))


@torch.no_grad()
def test_full_attention_is_of_one_thread():
    model, ids = with_memory(tiny()), token_ids(60)
    with full_attention(model):
        full = model(ids, use_cache=False).logits
    plain = model(ids, use_cache=False).logits

    def teacher():
        with full_attention(model):
            return model(ids, use_cache=False).logits

    found = interleaved(model, teacher, lambda: model(ids, use_cache=False).logits)
    assert alike(found[0], full) and alike(found[1], plain) and not alike(full, plain)


def test_full_attention_with_checkpointed_layers():
    """They are computed again in the backward pass."""
    model, ids = with_memory(tiny()), token_ids(40)

    def gradient(checkpointed):
        model.train()
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        x = model.get_input_embeddings()(ids).detach().requires_grad_()
        with full_attention(model):
            model(inputs_embeds=x, use_cache=False).logits.square().sum().backward()
        return x.grad

    assert alike(gradient(False), gradient(True))


@pytest.mark.parametrize(
    "second",
    [
        lambda model, cache: ahn.read(model, token_ids(9), cache),
        lambda model, cache: ahn.generate(model, token_ids(3), cache, max_new_tokens=3, **GREEDY),
        lambda model, cache: model(token_ids(3), **{PAST: cache}),
        lambda model, cache: cache.fork(),
        lambda model, cache: copy.deepcopy(cache),
        lambda model, cache: cache.save("never.ahn"),
    ],
    ids=["read", "generate", "forward", "fork", "deepcopy", "save"],
)
def test_a_cache_that_is_in_use(second):
    model, ids = with_memory(tiny()), token_ids(60)
    cache = ahn.read(model, ids[:, :30])
    expected = ahn.read(model, ids).last_logits
    found = interleaved(model, lambda: ahn.read(model, ids[:, 30:], cache, chunk=10), lambda: second(model, cache))
    assert isinstance(found[1], UnsupportedOperationError) and "in use by another call" in str(found[1])
    assert alike(found[0].last_logits, expected)
    assert ahn.read(model, token_ids(1), cache).tokens_seen == 61  # and free again


def test_a_call_within_another_on_the_same_cache():
    model = with_memory(tiny())
    cache, seen = ahn.AHNCache(model), []

    def progress(done, total):
        seen.append(cache.fork().tokens_seen)
        ahn.read(model, token_ids(3), cache)

    with pytest.raises(UnsupportedOperationError, match="in use"):
        ahn.read(model, token_ids(20), cache, chunk=10, progress=progress)
    assert seen == [10] and ahn.read(model, token_ids(3), cache).tokens_seen == 13


def test_two_of_transformers_own_loops_on_one_cache():
    """Whichever is second finds other tokens in the cache than it has given it."""
    model, ids = with_memory(tiny()), token_ids(10)
    cache = ahn.AHNCache(model)

    def call():
        return model.generate(ids, **{PAST: cache}, max_new_tokens=5, **GREEDY)

    found = interleaved(model, call, call)
    assert isinstance(found[1], AHNError) and torch.equal(found[0], model.generate(ids, max_new_tokens=5, **GREEDY))


def test_loads_that_overlap_leave_the_progress_bars():
    from tqdm.auto import tqdm

    from ahn.quiet import quiet

    before, first, second = tqdm.__init__, quiet(), quiet()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert tqdm.__init__ is not before  # the second still wants none
    second.__exit__(None, None, None)
    assert tqdm.__init__ is before


def test_copies_are_forks_and_do_not_copy_the_model():
    model, ids = with_memory(tiny()), token_ids(60)
    cache = ahn.read(model, ids[:, :40])
    for copied in (copy.copy(cache), copy.deepcopy(cache), copy.deepcopy({"cache": cache})["cache"]):
        assert copied._model is model and copied.layers[0].keys is not cache.layers[0].keys
        assert alike(ahn.read(model, ids[:, 40:], copied).last_logits, ahn.read(model, ids).last_logits)
    assert cache.tokens_seen == 40
    with pytest.raises(UnsupportedOperationError, match=r"cache\.save"):
        pickle.dumps(cache)


def test_a_copy_of_a_model_has_memories_of_its_own(graph):
    model = with_memory(tiny())
    cache = ahn.read(model, token_ids(30))
    with torch.no_grad():
        model(token_ids(1), **{PAST: cache})
    twin = copy.deepcopy(model)
    assert twin._ahn.model is twin and twin._ahn.graph is None
    assert twin._ahn.layers[0] is twin.model.layers[0].self_attn.ahn
    assert ahn.read(twin, token_ids(30)).tokens_seen == 30
    with pytest.raises(ConfigError, match="another model"):
        ahn.read(twin, token_ids(3), cache)


@pytest.mark.parametrize("own", [True, False], ids=["ahn.generate", "model.generate"])
@pytest.mark.parametrize("at", range(6))
def test_ctrl_c_ends_after_the_token(own, at):
    """Wherever it comes, in a layer or in the head, the memory goes on as if nothing had happened."""
    model, ids = with_memory(tiny()), token_ids(40)
    cache, calls = ahn.read(model, ids[:, :30]), []
    place = [model.model.layers[0].self_attn.q_proj, model.model.layers[1].mlp, model.lm_head][at % 3]

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 1 + at // 3 * 2:
            signal.raise_signal(signal.SIGINT)

    hook = place.register_forward_hook(interrupt)
    options = {"max_new_tokens": 8, **GREEDY}
    with pytest.raises(KeyboardInterrupt):
        _ = (
            ahn.generate(model, ids[:, 30:], cache, **options)
            if own
            else model.generate(ids, **{PAST: cache}, **options)
        )
    hook.remove()
    assert cache.tokens_seen == 40 + at // 3 * 2
    expected = model.generate(ids, max_new_tokens=8, **GREEDY)[:, : cache.tokens_seen]
    rest = token_ids(5, seed=8)
    whole = ahn.read(model, torch.cat([expected, rest], 1)).last_logits
    assert alike(ahn.read(model, rest, cache).last_logits, whole)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
