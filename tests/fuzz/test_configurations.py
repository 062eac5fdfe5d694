"""Random configurations: a text gives the same logits however it is cut, saved or forked on the way."""

import dataclasses

import pytest
import torch

import ahn
from ahn import cells, stores
from ahn.compat import PAST
from ahn.config import FEATURE_MAPS, MEMORY_POSITIONS, SINK_POSITIONS
from conftest import storing, tiny, with_memory
from effort import draw_for, times

pytestmark = pytest.mark.slow

BAR = 1e-4
CASES = times(40)


@dataclasses.dataclass(frozen=True)
class Case:
    """A memory, a base and a text."""

    memory: dict
    heads: tuple[int, int]  # of queries, of keys and values
    layers: int
    grid: int  # of stores that have one: short texts cross it several times
    every: int
    rows: tuple[tuple[int, int], ...]  # padding on the left and on the right
    length: int
    sizes: tuple[int, ...]
    turn: int  # tokens before the memory is saved, or forked
    seed: int


def draw(number):
    random = draw_for("configuration", number)
    cell, store = random.choice([*shipped(cells), None]), random.choice([*shipped(stores), None])
    if cell is None and store is not None and stores.get(store).reads_state:
        cell = random.choice(shipped(cells))
    window, length, layers = random.randint(1, 32), random.randint(1, 100), random.choice([1, 2, 2, 3])
    memory = {
        "cell": cell,
        "window": window,
        "sinks": random.choice([0, 0, 1, 2, 4, 9, 30]),
        "layers": random.choice([None, None, random.sample(range(layers), random.randint(1, layers))]),
        "sink_positions": random.choice(SINK_POSITIONS),
        "memory_positions": random.choice(MEMORY_POSITIONS),
        "feature_maps": random.choice(FEATURE_MAPS),
        "window_gate": random.random() < 0.5,
    }
    if store is not None:
        size = random.choice([1, 2, 5, 8, 24, 100])
        memory |= {"store": store, "store_size": size, "store_span": random.randint(1, min(window, size, 9))}
    rows = [(0, 0)] * random.randint(1, 3)
    if random.random() < 0.6:
        rows = [_padding(random, length) for _ in rows]
    every = random.choice([1, 2, 8])
    return Case(
        memory,
        random.choice([(4, 2), (4, 4), (4, 1), (6, 3), (2, 2)]),
        layers,
        every * random.choice([2, 3, 5]),
        every,
        tuple(rows),
        length,
        _pieces(random, length),
        random.randint(1, length),
        random.randrange(1 << 30),
    )


def shipped(package):
    """The names of this package's own: other tests register more."""
    return [name for name in package.names() if package.get(name).__module__.startswith("ahn.")]


def _padding(random, length):
    left = random.choice([0, random.randrange(length)])
    return left, random.choice([0, 0, random.randrange(length - left)])


def _pieces(random, length):
    sizes = []
    while (left := length - sum(sizes)) > 0:
        sizes.append(min(left, random.choice([1, 1, 2, 3, 7, 16, 33, 64])))
    return tuple(sizes)


def build(case):
    heads, kv_heads = case.heads
    base = tiny(
        seed=case.seed % 1000,
        hidden_size=8 * heads,
        num_hidden_layers=case.layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    return with_memory(base, **case.memory) if case.memory.get("store") is None else storing(base=base, **case.memory)


@torch.no_grad()
def read(model, ids, mask, sizes, turn=None, between=None):
    """Logits of `ids` in pieces. After `turn` tokens `between` makes another cache of the one that read them."""
    cache, out, low = ahn.AHNCache(model), [], 0
    for size in sizes:
        out.append(model(ids[:, low : low + size], attention_mask=mask[:, : low + size], **{PAST: cache}).logits)
        low += size
        if low == turn:
            cache = between(cache)
    return torch.cat(out, 1)


def cut(sizes, turn):
    """The pieces before and after `turn` tokens; one that crosses it becomes two."""
    before, after, low = [], [], 0
    for size in sizes:
        high = low + size
        before.append(min(high, turn) - min(low, turn))
        after.append(max(high, turn) - max(low, turn))
        low = high
    return [size for size in before if size], [size for size in after if size]


@pytest.mark.parametrize("number", range(CASES))
def test_one_answer(number, monkeypatch, tmp_path):
    case = draw(number)
    print(case)  # pytest shows it when the test fails
    for name in shipped(stores):
        if stores.get(name).grid:
            monkeypatch.setattr(stores.get(name), "grid", case.grid)
        if stores.get(name).every:
            monkeypatch.setattr(stores.get(name), "every", case.every)
    model, length = build(case), case.length
    generator = torch.Generator().manual_seed(case.seed)
    ids = torch.randint(3, model.config.vocab_size, (len(case.rows), length), generator=generator)
    mask = torch.ones_like(ids)
    for row, (left, right) in enumerate(case.rows):
        mask[row, :left] = mask[row, length - right :] = 0
    real = mask.bool()

    with torch.no_grad():
        alone = [model(row[seen][None], use_cache=False).logits[0] for row, seen in zip(ids, real, strict=True)]
    expected = torch.cat(alone)

    def after_saving(cache):
        cache.save(tmp_path / "memory.ahn")
        return ahn.AHNCache.load(tmp_path / "memory.ahn", model)

    def as_fork(cache):
        """The fork goes on; the cache it was made from goes another way."""
        fork = cache.fork()
        with torch.no_grad():
            model(ids.flip(1), attention_mask=mask.new_ones(len(ids), case.turn + length), **{PAST: cache})
        return fork

    before, after = cut(case.sizes, case.turn)
    with torch.no_grad():
        ways = {"whole": model(ids, attention_mask=mask, use_cache=False).logits}
    ways |= {
        "in one piece": read(model, ids, mask, [length]),
        "in pieces": read(model, ids, mask, case.sizes),
        "token by token": read(model, ids, mask, [1] * length),
        "saved and loaded": read(model, ids, mask, before + after, case.turn, after_saving),
        "forked": read(model, ids, mask, [1] * case.turn + after, case.turn, as_fork),
    }
    assert expected.isfinite().all()
    for way, logits in ways.items():
        found = logits[:, :length][real]
        assert found.isfinite().all(), way
        assert (found - expected).abs().max() < BAR, way
