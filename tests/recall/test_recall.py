"""Passages, ways to find them, and reading them again."""

import copy
import importlib
import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ahn
from ahn.errors import ConfigError
from ahn.memory.archive import Archive
from ahn.memory.head_keys import UNKNOWN
from ahn.recall import Recall, find, finders, search
from ahn.recall.ask import best
from ahn.recall.finders import bm25
from ahn.recall.finders.base import Finder
from ahn.recall.finders.fused import ranks
from ahn.recall.finders.heads import by_passage, gathered
from ahn.recall.passages import LONGEST, SHORTEST, Passages, cut, cut_text, decode_each, sentence_ends
from ahn.recall.question import Question
from ahn.recall.words import words
from conftest import retrieval, tiny, with_memory
from tiny_tokenizer import tiny_tokenizer

FACTS = ["The cat sat on the mat.", "Who has the old mice?", "One quote was in the house."]
FILLER = "It was a day like any other day, and nobody said a thing about it. "


def naive(q, keys, bounds):
    """`by_passage` in float32, at once."""
    weights = (q @ keys.float().T).masked_fill(keys[:, 0] == UNKNOWN, -torch.inf).softmax(1)
    parts = [weights[:, low:high] for low, high in pairwise(bounds.tolist())]
    return torch.stack([part.amax(1) if part.shape[1] else torch.zeros(len(q)) for part in parts], 1)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    model = with_memory(tiny(vocab_size=len(tokenizer), max_position_embeddings=4096), window=360)
    model.ahn_retrieval = retrieval()
    return model


def document(secret="The captain hid the compass in a barrel of apples."):
    return FILLER * 5 + secret + " " + FILLER * 8


@pytest.fixture(scope="module")
def memory(model, tokenizer):
    return ahn.read(model, ahn.Dialogue(tokenizer).open(document()), archive="keys")


class TestPassages:
    def test_they_cover_the_text_and_end_with_sentences(self, memory, tokenizer):
        passages = Passages.of(memory.archive, tokenizer)
        assert passages.bounds[0] == 0 and passages.bounds[-1] == len(memory.archive)
        assert passages.lengths.max() <= LONGEST and (passages.lengths[:-1] >= SHORTEST).all()
        assert "".join(passages.texts).replace(
            "<|user|>\n", ""
        ).strip() == document().strip() or document().strip() in ("".join(passages.texts))
        ended = sum(text.rstrip().endswith(".") for text in passages.texts[:-1])
        assert ended >= len(passages.texts) // 2

    def test_a_long_sentence_is_cut(self):
        assert np.diff(cut(np.zeros(1000, bool))).max() == LONGEST
        assert np.diff(cut(np.ones(1000, bool))).tolist()[:-1] == [LONGEST] * (1000 // LONGEST)
        assert cut(np.ones(0, bool)).tolist() == [0]

    def test_the_beginning_does_not_depend_on_the_rest(self):
        rng = np.random.default_rng(0)
        ends = rng.random(3000) < 0.1
        whole = cut(ends)
        for length in (1, 95, 96, 97, 500, 2999):
            part = cut(ends[:length])
            assert part[-1] == length
            assert part[:-1].tolist() == whole[: len(part) - 1].tolist()

    @pytest.mark.parametrize("pre_tokenizer", ["gpt2", "qwen", "metaspace"])
    @pytest.mark.parametrize(
        ("text", "ends"),
        [
            ("A cat 1.5 2.5 3.5 4.5 5.5 6.5 7.5 8.5 today. ", "today."),
            ("The cat came in 2013. 86 mice did not", "2013."),
        ],
    )
    def test_no_number_is_cut(self, pre_tokenizer, text, ends):
        tokenizer = tiny_tokenizer(pre_tokenizer)
        ids = np.array(tokenizer(text * 40, add_special_tokens=False).input_ids)
        passages = [tokenizer.decode(ids[low:high]).strip() for low, high in pairwise(cut_text(ids, tokenizer))]
        assert len(passages) > 5 and all(passage.endswith(ends) for passage in passages[:-1])

    def test_they_grow_with_the_archive(self, tokenizer):
        ids = torch.tensor(tokenizer(document()).input_ids)
        archive = Archive()
        archive.add(ids[:100])
        first = Passages.of(archive, tokenizer)
        assert Passages.of(archive, tokenizer) is first
        archive.add(ids[100:])
        grown, fresh = Passages.of(archive, tokenizer), Passages(archive, tokenizer)
        assert grown.bounds.tolist() == fresh.bounds.tolist() and grown.texts == fresh.texts

    @pytest.mark.parametrize("pool", [1, 4])
    def test_groups_belong_to_the_passage_of_their_middle(self, memory, tokenizer, pool):
        passages = Passages.of(memory.archive, tokenizer)
        count = len(memory.archive) // pool
        bounds = passages.groups(pool, count).tolist()
        assert bounds[0] == 0 and bounds[-1] == count
        for passage, (low, high) in enumerate(pairwise(bounds)):
            for group in range(low, high):
                assert passages.bounds[passage] <= group * pool + pool // 2 < passages.bounds[passage + 1]

    def test_sentence_ends(self, tokenizer):
        ends = sentence_ends(tokenizer)
        for text, expected in ((".", True), ("\n", True), ("?", True), ("a", False), (",", False)):
            (id,) = tokenizer(text, add_special_tokens=False).input_ids
            assert ends[id] == expected


class TestWords:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("The CAT's 12 mice!", ["the", "cat", "s", "12", "mice"]),
            ("ﬁne Straße", ["fine", "strasse"]),
            ("知识图谱 is 好", ["知识", "识图", "图谱", "is", "好"]),
            ("snake_case — x", ["snake", "case", "x"]),
            ("किताब कहाँ है?", ["किताब", "कहाँ", "है"]),
            ("แมวอยู่", ["แม", "มว", "วอ", "อยู่"]),
            ("می\u200cروم co\u00adoperate", ["میروم", "cooperate"]),
            ("☺️ カナ・テスト", ["カナ", "テス", "スト"]),
            ("", []),
        ],
    )
    def test_words(self, text, expected):
        assert words(text) == expected


class TestFinders:
    def test_names(self):
        assert {"bm25", "fused", "heads"} <= set(finders.names())
        with pytest.raises(ConfigError, match="did you mean 'bm25'"):
            finders.get("bm52")

    @pytest.mark.parametrize("name", finders.names())
    def test_contract(self, name, model, memory, tokenizer):
        """A new finder in one file is held to this too."""
        before = memory.tokens_seen, len(memory.archive)
        passages = Passages.of(memory.archive, tokenizer)
        question = Question("Where is the compass?", model, tokenizer, memory)
        scores = finders.get(name)().scores(passages, question)
        assert scores.shape == (len(passages),) and np.isfinite(scores).all()
        again = finders.get(name)().scores(passages, Question("Where is the compass?", model, tokenizer, memory))
        assert np.allclose(scores, again)
        assert (memory.tokens_seen, len(memory.archive)) == before

    def test_bm25_finds_rare_words(self, model, memory, tokenizer):
        passages = Passages.of(memory.archive, tokenizer)
        question = Question("Where did the captain hide the compass?", model, tokenizer, memory)
        scores = finders.get("bm25")().scores(passages, question)
        assert "compass" in passages.texts[int(scores.argmax())]
        nothing = Question("zyxw?", model, tokenizer, memory)
        assert not finders.get("bm25")().scores(passages, nothing).any()

    @pytest.mark.parametrize(
        ("text", "asked", "answer"),
        [
            (
                "राम रोज़ सुबह बाज़ार जाता है। सीता ने चाबी लाल डिब्बे में रखी थी। मोहन शाम को नदी के किनारे बैठता है।",
                "चाबी किस डिब्बे में थी?",
                "चाबी",
            ),
            (
                "พ่อไปตลาดทุกเช้า\nแม่เก็บกุญแจไว้ในกล่องสีแดง\nน้องนั่งริมแม่น้ำตอนเย็น",
                "กุญแจอยู่ในกล่องไหน",
                "กุญแจ",
            ),
        ],
    )
    def test_bm25_finds_words_with_vowel_marks(self, text, asked, answer):
        texts = text.replace("।", "।\n").splitlines()
        passages = SimpleNamespace(archive=Archive(), texts=texts)
        scores = finders.get("bm25")().scores(passages, SimpleNamespace(text=asked))
        assert answer in texts[int(scores.argmax())]
        assert (scores > scores.max() / 2).sum() == 1  # single letters would find the others nearly as well

    def test_keys_are_read_once_for_each_question(self, model, memory, tokenizer, monkeypatch):
        from ahn.recall import support
        from ahn.recall.finders import heads

        passages = Passages.of(memory.archive, tokenizer)
        question = Question("Where is the compass?", model, tokenizer, memory)
        heads.nothing(passages, question)
        calls, real = [], heads.by_passage
        monkeypatch.setattr(heads, "by_passage", lambda *args: calls.append(1) or real(*args))
        finders.get("fused")().scores(passages, question)
        once = len(calls)
        assert once and support.of_passages(passages, [0], question) and len(calls) == once

    def test_heads_are_a_softmax_over_all_keys(self):
        """The naive form, of queries that int8 holds."""
        generator = torch.Generator().manual_seed(0)
        q = torch.randint(-127, 128, (3, 8), generator=generator) / 2540
        q[:, 0] = 0.05
        keys = torch.randint(-127, 128, (100, 8), generator=generator, dtype=torch.int8)
        bounds = torch.tensor([0, 3, 10, 11, 60, 60, 100, 100])  # two are empty
        keys[50, 0] = keys[10, 0] = -128  # one has no known key
        assert torch.allclose(by_passage(q, keys, bounds), naive(q, keys, bounds), atol=1e-6)

    def test_rounded_queries_find_the_same_passages(self):
        """Of the shape of a real head. Attention is off by 3% of the largest at most, so close ranks may change."""
        generator = torch.Generator().manual_seed(0)
        q = torch.randn(32, 128, generator=generator) / 300
        keys = (35 * torch.randn(8000, 128, generator=generator)).clamp(-127, 127).to(torch.int8)
        bounds = torch.tensor([*range(0, 8000, 83), 8000])
        found, exact = (of(q, keys, bounds).mean(0) for of in (by_passage, naive))
        assert (found - exact).abs().max() < 0.03 * exact.max()
        assert set(found.topk(8).indices.tolist()) <= set(exact.topk(10).indices.tolist())

    def test_every_device_multiplies_alike(self, monkeypatch):
        q, keys = torch.randn(2, 8) / 30, torch.randint(-127, 128, (500, 8), dtype=torch.int8)
        bounds = torch.tensor([*range(0, 500, 9), 500])
        rounded = by_passage(q, keys, bounds)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        exact = by_passage(q, keys, bounds)
        assert torch.allclose(exact, naive(q, keys, bounds), atol=1e-6)
        assert (rounded - exact).abs().max() < 0.05 * exact.max()

    @pytest.mark.parametrize(("limit", "size"), [("BLOCK", 37), ("SCORES", 74), ("SCORES", 1)])
    def test_blocks_do_not_matter(self, monkeypatch, limit, size):
        from ahn.recall.finders import heads

        q, keys = torch.randn(2, 8), torch.randint(-127, 128, (500, 8), dtype=torch.int8)
        keys[9:40, 0] = -128
        bounds = torch.tensor([*range(0, 500, 9), 500])
        whole = by_passage(q / 30, keys, bounds)
        monkeypatch.setattr(heads, limit, size)
        assert torch.allclose(by_passage(q / 30, keys, bounds), whole, atol=1e-6)

    def test_passages_are_gathered_where_they_are_not_reduced(self):
        """On a GPU; the meaning of both forms is the same."""
        from ahn.recall.finders.heads import largest_of

        scores, bounds = torch.randn(2, 50), torch.tensor([0, 0, 7, 8, 30, 50, 50])
        expected = [[row[a:b].max() if b > a else -torch.inf for a, b in pairwise(bounds.tolist())] for row in scores]
        assert torch.equal(largest_of(scores, bounds), torch.tensor(expected))
        assert torch.equal(gathered(scores, bounds), torch.tensor(expected))

    def test_layers_behind_the_last_head_are_not_computed(self, model, memory, tokenizer):
        calls = []
        hook = model.get_decoder().layers[1].register_forward_hook(lambda *_: calls.append(1))
        try:
            question = Question("Where?", model, tokenizer, memory)
            first = question.queries_of({0: [1]}, 64)
            assert not calls
            both = question.queries_of({0: [1], 1: [0]}, 64)
            assert torch.equal(first[0], both[0]) and 1 in both and both[1].abs().sum() > 0
        finally:
            hook.remove()

    def test_heads_need_keys(self, model, tokenizer):
        cache = ahn.read(model, ahn.Dialogue(tokenizer).open(document()), archive="text")
        with pytest.raises(ConfigError, match="holds no keys"):
            find(model, tokenizer, cache, "Where?", 300, finder="heads")
        assert find(model, tokenizer, cache, "Where is the compass?", 300, finder="fused")
        assert find(model, tokenizer, cache, "Where is the compass?") == ()  # by default only with keys

    def test_a_finder_of_another_package(self, model, memory, tokenizer):
        class Last(Finder):
            name = "last"

            def scores(self, passages, question):
                return np.arange(len(passages), dtype=np.float32)

        finders.register("last", Last)
        try:
            found = find(model, tokenizer, memory, "Where?", 100, finder="last")
            assert found and found[-1].end <= len(memory.archive)
        finally:
            finders._registry._loaders.pop("last")

    def test_ranks(self):
        assert ranks(np.array([0.5, 2.0, 0.5])).tolist() == [1, 0, 2]


class TestFind:
    def test_in_the_order_of_the_text_within_the_budget(self, model, memory, tokenizer):
        found = find(model, tokenizer, memory, "Where did the captain hide the compass?", 200)
        assert [source.start for source in found] == sorted(source.start for source in found)
        assert 0 < sum(source.end - source.start for source in found) <= 200
        assert any("compass" in source.text for source in found)

    def test_what_a_chat_still_holds_is_left_out(self, model, tokenizer):
        """A passage that what is read again pushes out of the window is not held."""
        text = f"{FILLER * 8}The captain hid the compass. {FILLER}"
        question, dialogue = "Where did the captain hide the compass?", ahn.Dialogue(tokenizer)
        length = dialogue.question(question).shape[1]
        memory = ahn.read(model, dialogue.open(text), archive="text")
        for recall, prompt, found in (
            (100, None, True),
            (100, dialogue.question, False),
            (280, dialogue.question, True),
        ):
            sources = search(model, tokenizer, memory, question, Recall(recall, "bm25"), prompt=prompt).sources
            assert any("compass" in source.text for source in sources) == found
            if prompt is not None:
                held = len(memory.archive) + recall + length - memory.config.window
                assert all(memory.config.sinks < source.end and source.start < held for source in sources)

    def test_a_text_that_fits_is_not_recalled(self, model, tokenizer):
        cache = ahn.read(model, torch.tensor([[5, 6, 7]]), archive="text")
        assert find(model, tokenizer, cache, "Where?") == ()

    def test_the_second_round_has_the_best_passage_in_mind(self, model, memory, tokenizer):
        asked = []

        class Last(Finder):
            name = "last"

            def scores(self, passages, question):
                asked.append(question.text)
                return np.arange(len(passages), dtype=np.float32)

        finders.register("last", Last)
        try:
            find(model, tokenizer, memory, "Where?", 300, finder="last", rounds=2)
        finally:
            finders._registry._loaders.pop("last")
        best_text = Passages.of(memory.archive, tokenizer).texts[-1].strip()
        assert asked == ["Where?", f"{best_text}\nWhere?"]

    def test_two_rounds_take_no_passage_twice(self, model, memory, tokenizer):
        found = find(model, tokenizer, memory, "Where did the captain hide the compass?", 300, rounds=2)
        assert len({source.start for source in found}) == len(found)
        assert sum(source.end - source.start for source in found) <= 300

    def test_passages_that_the_window_does_not_hold_are_dropped(self, model, memory, tokenizer, caplog):
        """Their introduction needs room too."""
        asked = "Where is the compass?"
        found = find(model, tokenizer, memory, asked, 200, finder="bm25")
        first, *rest = (source.end - source.start for source in found)
        length, fork = ahn.Dialogue(tokenizer).question(asked).shape[1], memory.fork()
        budget = sum([first, *rest])
        for more, count in ((0, len(rest)), (40, len(found))):
            fork.config = memory.config.replace(window=budget + length + more)
            caplog.clear()
            kept = find(model, tokenizer, fork, asked, budget, finder="bm25")
            assert len(kept) == count and all(source in found for source in kept)
            assert (f"{count} of {len(found)} passages are read again" in caplog.text) == (count < len(found))
        fork.config = memory.config.replace(window=length)
        with pytest.raises(ConfigError, match=f"recall=1: the window of {length} tokens .* and 0 more"):
            find(model, tokenizer, fork, asked, 1)
        fork.config = memory.config.replace(window=length - 1)
        with pytest.raises(ConfigError, match=f"question of {length} tokens .* window of {length - 1}"):
            find(model, tokenizer, fork, asked, 0)

    def test_best(self):
        scores, lengths = np.array([1.0, 3.0, -np.inf, 2.0]), np.array([10, 20, 5, 30])
        assert best(scores, lengths, 60) == [1, 3, 0]
        assert best(scores, lengths, 49) == [1]
        assert best(scores, lengths, 0) == []

    @pytest.mark.parametrize("changes", [{"recall": -1}, {"recall": "many"}, {"recall": True}, {"rounds": 3}])
    def test_refused(self, model, memory, tokenizer, changes):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            find(model, tokenizer, memory, "Where?", **changes)
        with pytest.raises(ConfigError, match="question"):
            find(model, tokenizer, memory, "  ")
        plain = ahn.read(model, torch.tensor([[5, 6, 7]]))
        with pytest.raises(ConfigError, match="no archive"):
            find(model, tokenizer, plain, "Where?", 100)
        assert find(model, tokenizer, plain, "Where?") == ()


class TestAsk:
    def test_the_memory_is_not_changed(self, model, memory, tokenizer):
        before = {i: {n: t.clone() for n, t in layer.tensors.items()} for i, layer in enumerate(memory.layers)}
        seen = memory.tokens_seen, len(memory.archive)
        answer = ahn.ask(model, tokenizer, memory, "Where is the compass?", max_new_tokens=4, do_sample=False)
        assert answer.sources and isinstance(answer.text, str) and len(answer.ids) <= 4
        assert (memory.tokens_seen, len(memory.archive)) == seen
        for i, layer in enumerate(memory.layers):
            assert all(torch.equal(t, before[i][n]) for n, t in layer.tensors.items())

    def test_without_recall_it_is_what_it_was(self, model, memory, tokenizer):
        ids = ahn.Dialogue(tokenizer).question("Where is the compass?")
        expected = ahn.generate(model, ids, memory.fork(), max_new_tokens=5, do_sample=False, pad_token_id=0)[0]
        answer = ahn.ask(model, tokenizer, memory, "Where is the compass?", 0, max_new_tokens=5, do_sample=False)
        assert answer.ids.tolist() == expected.tolist() and answer.sources == ()

    def test_passages_are_read_in_front_of_the_question(self, model, memory, tokenizer):
        answer = ahn.ask(model, tokenizer, memory, "Where is the compass?", 100, max_new_tokens=5, do_sample=False)
        text = "Passages from the text:\n\n" + "\n\n".join(s.text.strip() for s in answer.sources)
        dialogue = ahn.Dialogue(tokenizer)
        ids = torch.cat([dialogue.open(text), dialogue.question("Where is the compass?")], 1)
        expected = ahn.generate(model, ids, ahn.AHNCache(model), max_new_tokens=5, do_sample=False, pad_token_id=0)[0]
        assert answer.ids.tolist() == expected.tolist()

    def test_an_empty_memory(self, model, tokenizer):
        with pytest.raises(ConfigError, match="empty"):
            ahn.ask(model, tokenizer, ahn.AHNCache(model, "text"), "Where?")

    def test_no_passage_goes_over_the_end_of_a_document(self, model, tokenizer):
        texts = {"one.txt": "The baker is Luis. He owns a dog.", "two.txt": "A bell", "three.txt": document()}
        cache = ahn.AHNCache(model, "text")
        for name, text in texts.items():
            cache.archive.begin(name)
            ids = tokenizer(text, add_special_tokens=False).input_ids
            cache.archive.locate(cache.tokens_seen, np.arange(len(ids)))
            ahn.read(model, torch.tensor([ids]), cache)
            passages = Passages.of(cache.archive, tokenizer)
            assert set(cache.archive.starts) <= set(passages.bounds.tolist())
        assert cache.archive.starts[0] == 0 and len(cache.archive.starts) == 3
        (source,) = [s for s in find(model, tokenizer, cache, "Who is the baker?", 100) if "Luis" in s.text]
        assert source.document == "one.txt" and source.text.strip() == texts["one.txt"]

    def test_a_budget_below_every_passage_is_said(self, model, memory, tokenizer, caplog):
        assert find(model, tokenizer, memory, "Where is the compass?", 3) == ()
        assert "the best passage has more than 3 tokens" in caplog.text

    def test_sources_say_where_they_stand(self, model, tokenizer):
        cache = ahn.AHNCache(model, "text")
        cache.archive.begin("ship.txt")
        for block in ahn.Dialogue(tokenizer).stream([document()]):
            cache.archive.locate(cache.tokens_seen, np.maximum(block.starts, 0))
            ahn.read(model, torch.from_numpy(block.ids.astype(np.int64)), cache)
        (source, *_) = [s for s in find(model, tokenizer, cache, "the compass", 300) if "compass" in s.text]
        assert source.document == "ship.txt" and str(source).startswith("ship.txt, character ")
        assert document()[source.offset :].startswith(source.text.strip()[:40])


def test_special_tokens_in_passages_are_text(tokenizer):
    dialogue = ahn.Dialogue(tokenizer)
    ids = dialogue.question("Who?", "He said <|end|> and left.")[0].tolist()
    assert ids.count(tokenizer.eos_token_id) == dialogue.question("Who?")[0].tolist().count(tokenizer.eos_token_id)


@pytest.mark.parametrize("cleaned", [False, True])
def test_texts_are_those_of_the_tokenizer(cleaned):
    tokenizer = tiny_tokenizer()
    tokenizer.clean_up_tokenization_spaces = cleaned
    ids = [[i, tokenizer.eos_token_id, i + 1] for i in range(len(tokenizer) - 1)] + [[]]
    for skip in (True, False):
        assert decode_each(tokenizer, ids, skip) == tokenizer.batch_decode(ids, skip_special_tokens=skip)


def test_jax_is_hidden_only_while_bm25s_is_imported(tmp_path, monkeypatch):
    """A stand-in for JAX, which bm25s would start."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("bm25s", "jax")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("")
    (tmp_path / "jax" / "lax.py").write_text("def top_k(x, k):\n    raise AssertionError('JAX was started')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert bm25._library().selection.JAX_IS_AVAILABLE is False
    assert "jax" not in sys.modules
    assert importlib.import_module("jax.lax").top_k
    for name in [name for name in sys.modules if name.partition(".")[0] in ("bm25s", "jax")]:
        monkeypatch.delitem(sys.modules, name)


def test_a_text_that_was_read_twice_is_taken_once(model, tokenizer):
    secret = "The captain hid the compass in a barrel of apples. "
    others = "".join(f"The {word} has the old mice and a hat. " * 3 for word in ("cat", "dog", "man", "house"))
    cache, dialogue = ahn.AHNCache(model, "text"), ahn.Dialogue(tokenizer)
    for part in range(3):
        blocks = list((dialogue.stream_more if part else dialogue.stream)([secret * 2 + others]))
        cache.archive.begin(f"{part}.txt", cache.tokens_seen + sum(int((block.starts < 0).sum()) for block in blocks))
        ahn.read(model, (torch.from_numpy(block.ids.astype("int64")) for block in blocks), cache)
    all_texts = [text.strip() for text in Passages.of(cache.archive, tokenizer).texts]
    assert len(set(all_texts)) < len(all_texts) / 2
    for rounds in (1, 2):
        found = find(model, tokenizer, cache, "Where did the captain hide the compass?", 250, rounds=rounds)
        texts = [source.text.strip() for source in found]
        assert any("compass" in text for text in texts) and len(set(texts)) == len(texts) >= 2


def test_a_passage_over_several_pages(model, tokenizer):
    """It names the pages that its words stand on, not those of the spaces around it, and its first character."""
    pages = [
        "The cat sat on the mat",
        " and the old mice looked at it",
        " for a day in the house.\n\n",
        "It was a hat. " * 9,
    ]
    text, cache = "".join(pages), ahn.AHNCache(model, "text")
    ids = ahn.Dialogue(tokenizer).open(text)[0]
    starts = np.concatenate([b.starts for b in ahn.Dialogue(tokenizer).stream([text])])
    first = int((starts < 0).sum())
    cache.archive.begin("one.pdf", first)
    ends = np.cumsum([len(page) for page in pages])
    numbers = np.searchsorted(ends, starts, side="right").clip(max=3) + 4
    for page in range(4, 8):
        here = np.flatnonzero((numbers == page) & (starts >= 0))
        cache.archive.locate(int(here[0]), starts[here], page)
    ahn.read(model, ids, cache)
    found = {source.offset: source for source in find(model, tokenizer, cache, "Who sat on the mat?", 200)}
    source = found[0]
    words = source.text.strip()
    assert text.startswith(words) and (source.page, source.last_page) == (4, int(np.searchsorted(ends, len(words))) + 4)
    assert source.last_page > 4 and str(source).startswith(f"one.pdf, pages 4-{source.last_page}, character 0")
    for offset, other in found.items():
        assert text[offset:].startswith(other.text.strip())
    last = found[max(found)]
    assert last.page == last.last_page == 7 and "page 7, " in str(last)


def test_a_memory_file_can_be_asked(model, memory, tokenizer, tmp_path):
    question, options = "Where is the compass?", {"max_new_tokens": 4, "do_sample": False}
    memory.save(tmp_path / "m.ahn")
    expected = ahn.ask(model, tokenizer, memory, question, 100, **options)
    for path in (tmp_path / "m.ahn", str(tmp_path / "m.ahn")):
        answer = ahn.ask(model, tokenizer, path, question, 100, **options)
        assert answer.ids.tolist() == expected.ids.tolist() and answer.sources == expected.sources
    with pytest.raises(ahn.errors.MemoryFileError, match=r"absent\.ahn"):
        ahn.ask(model, tokenizer, tmp_path / "absent.ahn", question)
    with pytest.raises(ConfigError, match=r"of type int: expected an ahn\.AHNCache"):
        ahn.ask(model, tokenizer, 3, question)


def test_the_chat_template_is_no_passage(model, tokenizer):
    """In front of a document whose first token is noted it would be a passage of its own."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}the old mice are here.\n{{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}in the house:\n{% endif %}"
    )
    dialogue = ahn.Dialogue(tokenizer)
    first, cache = dialogue.opening, ahn.AHNCache(model, "text")
    assert dialogue.has_template
    cache.archive.begin("one.txt", first)
    ahn.read(model, dialogue.open("The cat sat on the mat. " * 8), cache)
    front = tokenizer.decode(cache.archive.ids[:first].tolist(), skip_special_tokens=True).strip()
    assert front
    found = find(model, tokenizer, cache, front, 200)
    assert found and all(front not in source.text for source in found)
