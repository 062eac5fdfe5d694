"""The batch engine gives every request what it would get alone."""

import asyncio
import random
import threading
import time

import pytest
import test_decoding
import torch

import ahn
from ahn import stores
from ahn.compat import PAST
from ahn.engine import graph
from ahn.engine.batch import Engine
from ahn.engine.few_rows import weights_first
from ahn.engine.jobs import Pace
from ahn.engine.sequence import Finish, Request, Text, Token, Usage
from ahn.engine.slots import Slots
from ahn.errors import ConfigError, EngineError
from ahn.memory.batch import ForwardBatch
from ahn.ops import dispatch
from conftest import FORMS, retrieval, storing, tiny, with_memory
from tiny_tokenizer import tiny_tokenizer

replays = test_decoding.replays
TOKENIZER = tiny_tokenizer()
SIZE = len(TOKENIZER)


def ids_of(length, seed):
    return torch.randint(3, SIZE, (1, length), generator=torch.Generator().manual_seed(seed))


def small(**changes):
    return with_memory(tiny(vocab_size=SIZE), **changes)


def alone(model, ids, count, memory=None):
    """Greedy ids, and the logits behind each, without a batch."""
    cache = ahn.AHNCache(model) if memory is None else memory.fork()
    found, logits = [], []
    with torch.no_grad():
        for _ in range(count):
            out = model(ids, **{PAST: cache}).logits[:, -1]
            logits.append(out[0])
            found.append(int(out.argmax()))
            ids = torch.tensor([found[-1:]])
    return found, torch.stack(logits)


@pytest.fixture
def engine():
    engines = []

    def make(model, **options):
        engines.append(Engine(model, TOKENIZER, **options))
        engines[-1].start()
        return engines[-1]

    yield make
    for one in engines:
        one.close()


def request(ids, count=12, **options):
    return Request(ids=ids, max_new_tokens=count, ends=False, **options)


def test_an_answer_is_that_of_the_request_alone(engine, cell):
    model = small(cell=cell)
    served = engine(model)
    lengths = (1, 2, 9, 20, 33)
    streams = [served.submit(request(ids_of(n, n))) for n in lengths]
    for n, stream in zip(lengths, streams, strict=True):
        result = stream.result()
        assert result.ids == alone(model, ids_of(n, n), 12)[0]
        assert result.finish.reason == "length" and result.finish.usage.prompt_tokens == n


class ByHand(Engine):
    """An engine whose turns the test takes, with pieces of random lengths, and which notes all logits."""

    alive = True

    def __init__(self, model, seed, **options):
        super().__init__(model, TOKENIZER, **options)
        self.allocate()
        self.random, self.logits = random.Random(seed), {}

    def turn(self):
        self._shared.tokens = self._alone.tokens = self.random.choice((1, 2, 5, 16, 40))
        with torch.no_grad():
            self._turn()

    @property
    def busy(self):
        load = self.load
        return load.decoding + load.reading + load.waiting

    def allocate(self):
        super().allocate()
        self.step, self.memories.step = self.memories.step, self.noted_step

    def stepped(self, positions):
        pass

    def noted_step(self, tokens, positions):
        self.stepped(positions)
        found = self.step(tokens, positions)
        for chat, row in zip(self._decoding, found, strict=True):
            if chat.reason is None:
                self.logits.setdefault(chat.stream, []).append(row.clone())
        return found


def schedule(model, seed, stepped=None):
    """Random requests, each with what it gets alone, after random joins, leaves and cancellations. `stepped`: called
    before each step."""
    draw = random.Random(seed)
    memories = [None, *(ahn.read(model, ids_of(n, 50 + n)) for n in (1, 7, 19, 23, 31, 60))]
    served, left, running = ByHand(model, seed, slots=draw.choice((1, 2, 3, 5))), 14, []
    served.stepped = stepped or served.stepped
    while left or served.busy:
        if left and draw.random() < 0.4:
            ids, memory, count = (
                ids_of(draw.choice((1, 2, 3, 8, 30)), left),
                draw.choice(memories),
                draw.choice((1, 6, 25)),
            )
            running.append(
                (served.submit(request(ids, count, memory=memory, keep=draw.random() < 0.4)), ids, count, memory)
            )
            left -= 1
        if running and draw.random() < 0.05:
            draw.choice(running)[0].cancel()
        served.turn()
    return served, running


def check_schedule(model, seed):
    served, running = schedule(model, seed)
    ended = 0
    for stream, ids, count, memory in running:
        result = stream.result()
        tokens, logits = alone(model, ids, count, memory)
        done = len(result.ids)
        assert result.finish.reason == ("cancelled" if done < count else result.finish.reason)
        if result.finish.reason == "cancelled":
            count = done
        assert result.ids == tokens[:done] and done == count
        if done:
            torch.testing.assert_close(torch.stack(served.logits[stream][:done]), logits[:done], atol=1e-4, rtol=0)
        if (kept := result.finish.memory) is not None:
            ended += 1
            after, one = (None if memory is None else memory.fork()), ids_of(5, 9)
            after = ahn.read(model, torch.cat([ids, torch.tensor([tokens])], 1), after)
            assert kept.tokens_seen == after.tokens_seen and kept.tokens_per_row == after.tokens_per_row
            torch.testing.assert_close(
                ahn.read(model, one, kept).last_logits, ahn.read(model, one, after).last_logits, atol=1e-4, rtol=0
            )
    assert ended


@pytest.mark.parametrize("seed", range(3))
def test_a_random_schedule(cell, seed):
    check_schedule(small(cell=cell), seed)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_random_schedule_of_other_forms(form):
    check_schedule(small(**form), 5)


@pytest.mark.slow
@pytest.mark.parametrize("span", [1, 3])
def test_a_random_schedule_with_a_store(store, span, small_grids):
    check_schedule(storing(store, base=tiny(vocab_size=SIZE), store_span=span), 7)


def test_a_random_schedule_without_a_cell():
    check_schedule(small(cell=None), 3)
    check_schedule(storing("recency", cell=None, base=tiny(vocab_size=SIZE)), 4)


@pytest.fixture
def rows_made(monkeypatch):
    """The numbers of rows that graphs are made for."""
    made, make = [], graph.Graph.__init__

    def counted(self, handle, cache, rows):
        made.append(rows)
        make(self, handle, cache, rows)

    monkeypatch.setattr(graph.Graph, "__init__", counted)
    return made


def test_a_random_schedule_with_graphs(replays, rows_made):
    model = small()
    schedule(model, 11)
    assert len(rows_made) == len(set(rows_made)) and {1, 2} < set(rows_made)
    assert model._ahn.graph is None  # that of single caches is another
    check_schedule(model, 11)


@pytest.mark.slow
@pytest.mark.parametrize("span", [1, 3])
def test_a_random_schedule_with_graphs_and_a_store(replays, rows_made, store, span, small_grids, monkeypatch):
    """Also where rows whose store is not full are among others."""
    model, kinds, run = storing(store, base=tiny(vocab_size=SIZE), store_span=span), set(), graph.Graph._run

    def noted(self, cache, kind):
        kinds.add(kind)
        return run(self, cache, kind)

    monkeypatch.setattr(graph.Graph, "_run", noted)
    steps = []
    schedule(model, 7, steps.append)
    assert {kind.filling for kind in kinds} == {False, True}
    assert replays["replayed"] == len(steps) and len(rows_made) == len(set(rows_made))
    check_schedule(model, 7)


def test_graphs_are_captured_before_the_first_request(engine, replays, rows_made, store):
    model = storing(store, base=tiny(vocab_size=SIZE))
    served = engine(model, slots=6)
    tokens = served.submit(request(ids_of(9, 1))).result().ids
    assert rows_made == [1, 2, 4, 6] and replays["replayed"] == 2 * 4 + 12
    assert tokens == alone(model, ids_of(9, 1), 12)[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", [None, *stores.names()])
def test_graphs_of_all_numbers_of_rows_are_as_without(kind, cell, monkeypatch):
    """Random schedules on CUDA, with memories on the host; 16 slots, so graphs of 1, 2, 4, 8 and 16 rows."""
    base = tiny(vocab_size=SIZE)
    model = (with_memory(base, cell) if kind is None else storing(kind, cell, base=base)).cuda()
    captured, record = [], graph.Graph._record

    def noted(self, scratch, cache, how):
        captured.append((cache.batch_size, how))
        record(self, scratch, cache, how)

    monkeypatch.setattr(graph.Graph, "_record", noted)
    monkeypatch.setenv("AHN_KERNEL", ",".join(name for name in dispatch.KERNELS if name != "inductor"))
    served, requests = Engine(model, TOKENIZER, slots=16), []
    with served:
        memories = [None, *(served.read(ids_of(n, 50 + n)).result() for n in (1, 19, 31, 60))]
        for n in range(40):
            one = request(ids_of(n % 9 + 1, n), 5 + n % 20, memory=memories[n % 5], logprobs=1, keep=n % 3 == 0)
            requests.append((one, served.submit(one)))
        found = [(one, list(stream)) for one, stream in requests]
    assert served.error is None
    assert {rows for rows, _ in captured} == {1, 2, 4, 8, 16} and len(captured) == len(set(captured))
    assert {how.filling for _, how in captured} == ({False} if kind is None else {False, True})
    monkeypatch.setenv("AHN_KERNEL", "torch")
    for one, (*tokens, finish) in found:
        cache = ahn.AHNCache(model) if one.memory is None else Slots(model, 1).open(0, one.memory)
        ids = torch.cat([one.ids, torch.tensor([[token.id for token in tokens]])], 1).cuda()
        with torch.no_grad():
            logits = [ahn.read(model, ids[:, : one.ids.shape[1]], cache).last_logits]
            logits += [
                model(ids[:, at : at + 1], **{PAST: cache}).logits[:, -1]
                for at in range(one.ids.shape[1], ids.shape[1])
            ]
        for token, row in zip(tokens, torch.cat(logits).log_softmax(-1), strict=False):
            assert token.logprob == pytest.approx(float(row[token.id]), abs=2e-3)
            assert float(row.max()) - float(row[token.id]) < 2e-3
        if finish.memory is not None:
            assert finish.memory.layers[0].keys.device.type == "cpu"
            assert finish.memory.tokens_seen == (one.memory.tokens_seen if one.memory else 0) + ids.shape[1]


def test_what_a_request_asks_for_does_not_change_its_neighbours(engine):
    model, ids = small(), ids_of(9, 1)
    served = engine(model)
    drawn = {"temperature": 1.5, "top_p": 0.9}
    first = [served.submit(request(ids, 40, seed=seed, **drawn)).result().ids for seed in range(3)]
    streams = [served.submit(request(ids, 40, seed=seed, **drawn)) for seed in (2, 0, 1)]
    streams.append(served.submit(request(ids, 40, seed=0, temperature=1.5)))
    *again, other = (stream.result().ids for stream in streams)
    assert again == [first[2], first[0], first[1]] and other not in first
    assert len({*map(tuple, first)}) == 3


def test_logprobs_and_the_likeliest_tokens(engine):
    model, ids = small(), ids_of(9, 1)
    tokens, logits = alone(model, ids, 5)
    events = list(engine(model).submit(request(ids, 5, logprobs=3)))
    for event, token, row in zip(events[:-1], tokens, logits.log_softmax(-1), strict=True):
        assert isinstance(event, Token) and event.id == token == event.top[0][0]
        assert event.logprob == pytest.approx(float(row[token]), abs=1e-4) == event.top[0][1]
        assert [other for other, _ in event.top] == row.topk(3).indices.tolist()
    assert isinstance(events[-1], Finish)


def test_a_stop_ends_the_text_in_front_of_it(engine):
    model, ids = small(), ids_of(9, 1)
    served = engine(model)
    whole = served.submit(request(ids, 30)).result()
    assert whole.text == TOKENIZER.decode(whole.ids, skip_special_tokens=True)
    stop = whole.text[10:13]
    cut = served.submit(request(ids, 30, stop=("\0", stop))).result()
    assert cut.text == whole.text[: whole.text.find(stop)] and cut.finish.reason == "stop"
    assert cut.ids == whole.ids[: len(cut.ids)] and len(cut.ids) < 30


@pytest.mark.parametrize("kind", ["gpt2", "qwen", "metaspace"])
def test_text_waits_for_whole_characters_and_stops(kind):
    tokenizer = tiny_tokenizer(kind)
    words = "The (old) cat sat. Why?" if kind == "metaspace" else "The ä € 🐈 (old) cat sat."
    ids = tokenizer(words, add_special_tokens=False).input_ids
    text = Text(tokenizer)
    pieces = [text.add(token) for token in ids]
    assert "".join(pieces) == words == tokenizer.decode(ids) and not any("\ufffd" in piece for piece in pieces)
    for stop in (" cat", "(old)", "T"):
        text = Text(tokenizer, ["no such", stop])
        assert "".join(map(text.add, ids)) == words[: words.find(stop)] and text.stopped and text.rest() == ""
    text = Text(tokenizer, [words + "!", "!"])
    assert "".join(map(text.add, ids)) == "" and text.rest() == words and not text.stopped


def test_text_of_broken_characters_comes_all_the_same():
    (byte,) = TOKENIZER("€", add_special_tokens=False).input_ids[:1]
    text = Text(TOKENIZER)
    assert "".join(text.add(byte) for _ in range(40)) + text.rest() == "\ufffd" * 40


def test_a_stopping_token_ends_the_answer(engine):
    model, ids = small(), ids_of(9, 1)
    tokens, _ = alone(model, ids, 12)
    model.generation_config.eos_token_id = tokens[4]
    result = engine(model).submit(Request(ids=ids, max_new_tokens=12)).result()
    assert result.ids == tokens[: tokens.index(tokens[4]) + 1] and result.finish.reason == "stop"


def test_a_conversation_goes_on_from_the_memory_it_gave_back(engine):
    model = small()
    served = engine(model)
    memory = served.read(ids_of(50, 1)).result()
    layer = memory.layers[-1]
    before = layer.map(torch.Tensor.clone).tensors
    first = served.submit(request(ids_of(4, 2), memory=memory, keep=True)).result()
    second = served.submit(request(ids_of(4, 3), memory=first.finish.memory)).result()
    whole = torch.cat([ids_of(50, 1), ids_of(4, 2), torch.tensor([first.ids]), ids_of(4, 3)], 1)
    assert second.ids == alone(model, whole, 12)[0]
    assert second.finish.usage == Usage(50 + 4 + 12 + 4, 50 + 4 + 12, 12)
    assert all(
        torch.equal(before[name], tensor) for layer in memory.layers[-1:] for name, tensor in layer.tensors.items()
    )


@pytest.mark.parametrize("archive", ["none", "text", "keys"])
def test_reading_gives_the_memory_of_ahn_read(engine, archive):
    model, seen = small(), []
    model.ahn_retrieval = retrieval()
    served, ids = engine(model, chunk=16), ids_of(80, 1)
    found = served.read(ids, archive=archive, progress=lambda done, total: seen.append((done, total))).result()
    plain = ahn.read(model, ids, archive=archive)
    torch.testing.assert_close(found.last_logits, plain.last_logits, atol=1e-4, rtol=0)
    assert seen[-1] == (80, 80) and len(seen) > 3 and found.tokens_seen == 80
    assert (found.archive is None) == (archive == "none")
    if found.archive is not None:
        assert found.archive.ids.tolist() == ids[0].tolist()
    more = served.read(ids_of(7, 2), memory=found).result()
    assert more.tokens_seen == 87 and found.tokens_seen == 80
    torch.testing.assert_close(more.last_logits, ahn.read(model, ids_of(7, 2), plain).last_logits, atol=1e-4, rtol=0)


def test_a_memory_is_saved_and_loaded(engine, store, tmp_path):
    model = storing(store, base=tiny(vocab_size=SIZE))
    served = engine(model)
    for length in (3, 20, 60):
        found = served.read(ids_of(length, 1)).result()
        found.save(tmp_path / "memory")
        loaded = ahn.AHNCache.load(tmp_path / "memory", model)
        result = served.submit(request(ids_of(5, 2), memory=loaded)).result()
        assert result.ids == alone(model, torch.cat([ids_of(length, 1), ids_of(5, 2)], 1), 12)[0]


def test_short_prompts_pass_long_texts():
    served = ByHand(small(), 1, slots=2)
    long = [served.read(ids_of(4000, n)) for n in range(3)]
    served.turn()
    stream = served.submit(request(ids_of(30, 1), 3))
    for _ in range(60):
        served.turn()
    assert isinstance([*stream][-1], Finish) and not any(future.done() for future in long)
    assert served.load.reading == 1 and served.load.waiting == 2


def test_pieces_take_as_long_as_they_may():
    pace = Pace(0.1, 100)
    for count, seconds, tokens in ((32, 0.01, 64), (20, 9, 64), (64, 0.04, 100), (100, 0.06, 100), (100, 0.2, 50)):
        pace.note(count, seconds)
        assert pace.tokens == tokens
    pace.note(50, 0.2)
    assert pace.tokens == 32 and Pace(0.1, 8).tokens == 8


def test_cancelled_at_any_time():
    served = ByHand(small(), 1, slots=1)
    futures, streams = (
        [served.read(ids_of(500, n)) for n in range(2)],
        [served.submit(request(ids_of(9, 1), 100)) for _ in range(2)],
    )
    for _ in range(30):
        served.turn()
    assert served.load.decoding == 1 and served.load.waiting == 2
    for one in futures + streams:
        one.cancel()
    served.turn()
    assert not served.busy and sorted(served._free) == [1, 2]
    assert [stream.result().finish.reason for stream in streams] == ["cancelled"] * 2
    result = served.submit(request(ids_of(9, 1)))
    while served.busy:
        served.turn()
    assert result.result().ids == alone(served.model, ids_of(9, 1), 12)[0]


def test_one_that_fails_leaves_the_others(engine, monkeypatch):
    model = small()
    served = engine(model)
    bad = ahn.read(model, ids_of(9, 1))
    bad._forward_batch = ForwardBatch(torch.tensor([9]), 1, [1], written=True)
    good, worse = served.submit(request(ids_of(9, 1))), served.submit(request(ids_of(9, 1), memory=bad))
    finish = worse.result().finish
    assert finish.reason == "error" and "half-written" in str(finish.error)
    assert good.result().ids == alone(model, ids_of(9, 1), 12)[0] and served.alive


def test_a_failed_step_ends_the_engine(engine, monkeypatch):
    served = engine(small())
    monkeypatch.setattr(served.memories, "step", lambda *args: 1 / 0)
    stream, future = served.submit(request(ids_of(9, 1))), served.read(ids_of(4000, 1))
    finish = stream.result().finish
    assert finish.reason == "error" and isinstance(finish.error, ZeroDivisionError)
    assert isinstance(future.exception(), ZeroDivisionError)
    assert not served.alive and served.error is finish.error
    with pytest.raises(EngineError, match="has failed: division"):
        served.submit(request(ids_of(9, 1)))


def test_closing_cancels(engine):
    served = engine(small())
    stream, future = served.submit(request(ids_of(9, 1), 10**6)), served.read(ids_of(10**5, 1))
    next(iter(stream))
    served.close()
    assert stream.result().finish.reason == "cancelled"
    with pytest.raises(EngineError, match="closed"):
        future.result()
    with pytest.raises(EngineError, match="not running"):
        served.read(ids_of(9, 1))


def test_an_event_loop_reads_a_stream(engine):
    served = engine(small())

    async def read():
        stream = served.submit(request(ids_of(9, 1)))
        return [event async for event in stream]

    events = asyncio.run(read())
    assert [event.id for event in events[:-1]] == alone(served.model, ids_of(9, 1), 12)[0]
    assert events[-1].reason == "length"


def test_a_listener_that_fails_loses_its_own_stream_only(engine):
    served = engine(small())
    stream, seen = served.submit(request(ids_of(9, 1), 10**6)), []

    def listener(event):
        seen.append(event)
        raise ValueError("closed")

    stream.listen(listener)
    while not isinstance(seen[-1:] and seen[-1], Finish):
        time.sleep(0.001)
    assert seen[-1].reason == "cancelled" and served.alive


def test_functions_run_between_tokens(engine):
    served = engine(small())
    assert served.run(threading.get_ident).result() == served._thread.ident
    assert isinstance(served.run(lambda: 1 / 0).exception(), ZeroDivisionError) and served.alive


def test_bytes_are_known_before(store):
    for model in (small(), small(cell=None), storing(store, base=tiny(vocab_size=SIZE))):
        served = Engine(model, TOKENIZER, slots=3)
        served.allocate()
        assert sum(layer.nbytes for layer in served.memories.layers) == 5 * served.bytes_of_slot
        assert served.bytes_needed(4) - served.bytes_needed(3) == served.bytes_of_slot + 8 * SIZE
        assert ahn.read(model, ids_of(90, 1)).nbytes == served.bytes_of_slot


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: expected an integer of at least 1"),
        ({"temperature": -1}, "temperature=-1: expected a number of at least 0"),
        ({"top_p": 0}, "top_p=0: expected a number above 0"),
        ({"seed": -1}, "seed=-1"),
        ({"stop": "text"}, "stop='text': expected texts"),
        ({"logprobs": 21}, "logprobs=21: expected an integer of at least 0, at most 20"),
    ],
)
def test_bad_requests(options, message):
    with pytest.raises(ConfigError, match=message):
        Request(ids=[3], **options)


def test_bad_settings(engine):
    model = small()
    for options in ({"slots": 0}, {"readers": 1}, {"chunk": 0}, {"slice_seconds": 0}, {"alone_seconds": -1}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            Engine(model, TOKENIZER, **options)
    with pytest.raises(ConfigError, match="layer 1 keeps everything"):
        Engine(small(layers=(0,)), TOKENIZER)
    served = engine(model)
    for bad, message in (([], "at least one"), ([SIZE], "token id"), ([[3], [4]], "of 2 rows")):
        with pytest.raises(ConfigError, match=message):
            served.read(bad)
    with pytest.raises(ConfigError, match="another model"):
        served.read([3], memory=ahn.read(small(), ids_of(5, 1)))
    with pytest.raises(ConfigError, match="a memory of 2 rows"):
        served.read([3], memory=ahn.read(model, ids_of(5, 1).repeat(2, 1)))


def test_few_vectors_are_multiplied_by_weights_and_all_is_undone():
    model, plain = small(), torch.nn.Linear(8, 6)
    model.extra = plain
    for shape in ((2, 1, 8), (3, 8), (1, 8), (9, 8), (2, 2, 8)):
        x = torch.randn(shape)
        expected = plain(x)
        with weights_first(model):
            assert "forward" in vars(plain)
            torch.testing.assert_close(plain(x), expected)
            assert plain(x).is_contiguous() and plain(x.double().float()).shape == expected.shape
    assert not any("forward" in vars(module) for module in model.modules() if isinstance(module, torch.nn.Linear))


def test_many_threads_ask_at_once(engine):
    """Some change their minds; the others get what they would get alone."""
    model = small()
    served = engine(model, slots=3)
    memory = served.read(ids_of(40, 1)).result()
    expected = {n: alone(model, ids_of(n, n), 12, memory)[0] for n in range(1, 8)}
    wrong = []

    def ask(seed):
        draw = random.Random(seed)
        for _ in range(8):
            n, stops = draw.randrange(1, 8), draw.choice((0, 0, 1, 5))
            stream, seen = served.submit(request(ids_of(n, n), memory=memory)), []
            for event in stream:
                if isinstance(event, Token):
                    seen.append(event.id)
                if len(seen) == stops:
                    stream.cancel()
            whole = event.reason == "length"
            if seen != expected[n][: len(seen)] or (not stops and not whole) or (whole and len(seen) < 12):
                wrong.append((n, stops, event.reason, seen))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    reading = [served.read(ids_of(100 * n, n)) for n in range(1, 9)]
    assert all(future.cancel() for future in reading[4:])
    for thread in threads:
        thread.join()
    assert not wrong and served.alive
    assert [future.result().tokens_seen for future in reading[:4]] == [100, 200, 300, 400]
    while served.load.reading or served.load.waiting or served.load.decoding:
        time.sleep(0.001)
    assert sorted(served._free) == [3, 4] and not served._decoding and not served._waiting
