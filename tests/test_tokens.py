"""Text as token ids, block by block: the ids are those of one encode of the whole text."""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ahn import tokens
from tiny_tokenizer import SPECIAL, TEXT, tiny_tokenizer

KINDS = ["gpt2", "qwen", "llama3", "metaspace", "metaspace first", "unigram", "wordpiece", "words", "characters"]
TRAINED = [
    *TEXT,
    "aaaa aaaaaaaa\n\n\n\n        1234567890 中文的猫坐在垫子上。 caf\u00e9 cafe\u0301 🐈‍⬛👩‍👩‍👧 don't\r\n\r\n",
] * 2
PARTS = [
    *("The old cat sat on the mat. ", "don't ", "caf\u00e9 cafe\u0301 ", "12,345.678 ", "(old)", '"quote" ', "x", "ÄÖ"),
    *("\r\n", "\n", "\n\n", "\t", " ", "\u200b", "\u00a0", "\ufb01", "e\u0301\u0323\u0300"),
    *("日本。", "中文的猫坐在垫子上", "🐈‍⬛", "👩‍👩‍👧 "),
    *("<|", "|>", "</s>", "[CLS] ", "[UNK]", *SPECIAL),
]
RUNS = [" ", "\n", "\r\n", "a", "ab", "7", "0123456789", "中", "🐈", "\u0301", "=", "-- ", "\t ", SPECIAL[1], "</s>"]


def tokenizer_of(kind: str) -> Any:
    if kind in ("gpt2", "qwen", "metaspace"):
        return tiny_tokenizer(kind)
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "[UNK]", "[CLS]", *SPECIAL]
    options: dict[str, Any] = {"vocab_size": 420, "special_tokens": special, "show_progress": False}
    if kind == "llama3":
        cut = Regex(
            r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        made = Tokenizer(models.BPE(ignore_merges=True))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(cut, "isolated"), byte_level])
        made.post_processor = processors.ByteLevel(trim_offsets=True)
        trainer: Any = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    elif kind == "metaspace first":
        made = Tokenizer(models.BPE(unk_token="[UNK]", fuse_unk=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        made.normalizer = normalizers.NFC()
        trainer = trainers.BpeTrainer(**options)
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="[UNK]", **options)
    elif kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(**options)
    else:
        made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        made.pre_tokenizer = (
            pre_tokenizers.WhitespaceSplit() if kind == "words" else pre_tokenizers.Split("", "isolated")
        )
        trainer = trainers.WordLevelTrainer(**options)
    made.train_from_iterator(TRAINED, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="[UNK]")


def controls_of(tokenizer: Any) -> set[int]:
    """Ids of the special tokens, less the one for unknown text."""
    unknown = tokenizer.convert_tokens_to_ids(getattr(tokenizer.backend_tokenizer.model, "unk_token", None) or "[UNK]")
    return {id for id, token in tokenizer.added_tokens_decoder.items() if token.special} - {unknown}


def random_text(draw: random.Random) -> str:
    parts: list[str] = []
    for _ in range(draw.randint(5, 90)):
        if draw.random() < 0.08:
            parts.append(draw.choice(RUNS) * draw.choice([3, 30, 200, 700]))
        elif draw.random() < 0.1:
            parts.append(
                chr(draw.choice([draw.randint(1, 0x2FF), draw.randint(0x3040, 0x9FFF), draw.randint(0x1F300, 0x1FAFF)]))
            )
        else:
            parts.append(draw.choice(PARTS))
    return "".join(parts)


def in_pieces(text: str, draw: random.Random) -> Iterator[str]:
    at = 0
    while at < len(text):
        size = draw.choice([0, 1, 7, 100, 5000])
        yield text[at : at + size]
        at += size


def streamed(tokenizer: Any, pieces: Any) -> tuple[list[int], list[int]]:
    parts = list(tokens.stream(tokenizer, pieces))
    assert all(part.ids.dtype == np.int32 and part.starts.dtype == np.int64 for part in parts)
    return tuple([i for part in parts for i in getattr(part, name).tolist()] for name in ("ids", "starts"))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short texts have many."""
    monkeypatch.setattr(tokens, "BLOCK", 256)
    monkeypatch.setattr(tokens, "RUN", 8)


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_has_the_ids_of_one_whole_encode(kind: str) -> None:
    tokenizer, draw = tokenizer_of(kind), random.Random(kind)
    controls = controls_of(tokenizer)
    joined = 0
    for number in range(40):
        text = random_text(draw)
        ids, starts = streamed(tokenizer, in_pieces(text, draw))
        encoded = tokens.Encoder(tokenizer).encode(text)
        assert ids == encoded.ids.tolist(), (number, text)
        assert starts == encoded.starts.tolist(), (number, text)
        whole = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert not controls & {*ids}
        assert ids == whole or controls & {*whole}  # where the model itself holds them as words
        joined += len(list(tokens.stream(tokenizer, [text]))) > 1
    assert joined > 10


@pytest.mark.parametrize("kind", ["gpt2", "qwen", "metaspace", "unigram", "wordpiece"])
def test_one_run_longer_than_any_block(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks grow no further than LONGEST, so memory stays bounded; the text is read whole."""
    monkeypatch.setattr(tokens, "BLOCK", 256)
    monkeypatch.setattr(tokens, "LONGEST", 2048)
    tokenizer, longest = tokenizer_of(kind), 0
    encode = tokens.Encoder._encode

    def spy(self: Any, text: str, place: Any) -> Any:
        nonlocal longest
        longest = max(longest, len(text))
        return encode(self, text, place)

    monkeypatch.setattr(tokens.Encoder, "_encode", spy)
    for unit in ("a", " ", "\n", "中", "7"):
        text = "The old cat. " + unit * 20_000 + " sat."
        ids, _ = streamed(tokenizer, [text])
        assert longest <= 3 * 2048
        if kind in ("gpt2", "qwen") and unit != "7":  # BPE joins anywhere
            assert ids == tokens.Encoder(tokenizer).encode(text).ids.tolist()
            longest = 0


def test_lone_surrogates_are_replaced() -> None:
    tokenizer = tiny_tokenizer()
    assert streamed(tokenizer, ["a\udcff", "b"])[0] == tokenizer("a\ufffdb").input_ids


@pytest.mark.parametrize("pieces", [[], [""], ["", " ", ""]])
def test_little_text(pieces: list[str]) -> None:
    tokenizer = tiny_tokenizer()
    assert streamed(tokenizer, pieces)[0] == tokenizer("".join(pieces)).input_ids


@pytest.mark.usefixtures("small_blocks")
def test_a_tokenizer_without_offsets() -> None:
    fast, text = tiny_tokenizer(), "The old cat sat.\n\nWho sat? * one\n" * 60

    class Slow:
        is_fast = False
        added_tokens_decoder = fast.added_tokens_decoder

        def __call__(self, text: str, **options: Any) -> Any:
            return fast(text, **options)

    ids, starts = streamed(Slow(), in_pieces(text, random.Random(0)))
    assert ids == fast(text).input_ids
    assert starts == sorted(starts) and len(set(starts)) > 3


def test_the_tokenizer_stays_as_it_is() -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer(f"The{SPECIAL[1]}").input_ids
    streamed(tokenizer, [f"The{SPECIAL[1]}"])
    assert tokenizer(f"The{SPECIAL[1]}").input_ids == before
    assert not tokenizer.backend_tokenizer.encode_special_tokens


MEASURE = """
import resource, sys
sys.path[:0] = sys.argv[2:]
from ahn import tokens
from tiny_tokenizer import tiny_tokenizer
tokenizer, piece = tiny_tokenizer(), "The old cat sat on 12 mice.\\n" * 1000
def peak(pieces):
    for part in tokens.stream(tokenizer, (piece for _ in range(pieces))):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
print(peak(5), peak(int(sys.argv[1])))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text() -> None:
    """2.8 MB encoded at once take 400 MiB more."""
    folders = [str(Path(__file__).parent), str(Path(tokens.__file__).parents[1])]
    done = subprocess.run([sys.executable, "-c", MEASURE, "100", *folders], capture_output=True, text=True, check=True)
    small, large = map(int, done.stdout.split()[-2:])
    assert large - small < 100
