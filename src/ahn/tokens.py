"""Text of any length as token ids, in constant memory.

A tokenizer needs about 150 bytes for each byte that it encodes at once, so a long text is encoded block by block. A
block begins at a token of the block before it, and the two overlap. They are joined where both give the same run of
tokens, at a change between letters, spaces and other characters. Blocks grow until there is such a place.

BPE never merges across a token boundary, so the result equals one encode of the whole text. Other models tokenise the
words of their pre-tokenizer one by one, so they are joined between two words. A run of one kind of characters, or for
those models a word, that is longer than LONGEST is joined at the next best place, which need not be exact.

Strings such as `<|im_end|>` are read as the characters they are, never as the special token.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 15  # characters encoded at once
LONGEST = 1 << 19  # characters encoded at once if no shorter block can be joined
RUN = 24  # equal tokens that two blocks must share around a join

Ints: TypeAlias = npt.NDArray[Any]
Place = Literal["start", "segment", "inside"]
"""The place of a text: at the very start, after a special token, or after other text. Some tokenizers put a space
before text at the first two places, or at the first alone."""

_FIELDS = "ids", "starts", "ends", "free"
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Encoded:
    """Tokens of a text.

    Attributes:
        ids: int32 [n].
        starts: int64 [n], the place of each token's first character in the whole text.
    """

    ids: Ints
    starts: Ints


@dataclass(frozen=True)
class Tokens(Encoded):
    """Tokens with their ends, and with where text may be cut.

    Attributes:
        ends: int64 [n], the place behind the last character of each token.
        free: bool [n], whether the text before a token cannot change it: always for BPE, else where a word begins.
    """

    ends: Ints
    free: Ints

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice | Ints) -> Tokens:
        return Tokens(self.ids[part], self.starts[part], self.ends[part], self.free[part])

    def moved(self, by: int) -> Tokens:
        return Tokens(self.ids, self.starts + by, self.ends + by, self.free)

    @cached_property
    def boundaries(self) -> Ints:
        """Bool [n]: whether a token begins with a character of its own, not inside one of the token before."""
        return self.starts >= np.concatenate([[-1], np.maximum.accumulate(self.ends)[:-1]])

    def index(self, at: int) -> int:
        """The first token that begins at place `at` or later."""
        return int(np.searchsorted(np.maximum.accumulate(self.starts), at))


@lru_cache(maxsize=4)
def digest(tokenizer: Any) -> str:
    """A hash of a tokenizer's words and their ids. Ids of one tokenizer mean nothing to another."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(repr(words).encode("utf-8", "surrogatepass")).hexdigest()


def stream(tokenizer: Any, pieces: Iterable[str]) -> Iterator[Encoded]:
    """Token ids of a text that comes in pieces: those of one encode of the whole text, without special tokens.

    Args:
        tokenizer: a transformers tokenizer.
        pieces: the text, cut anywhere. Lone surrogates are read as U+FFFD.

    Yields:
        the tokens in order, some thousands at a time. Without offsets (`is_fast` false) each token has the start of its
        paragraph.
    """
    for tokens in Encoder(tokenizer).stream(pieces):
        yield Encoded(tokens.ids, tokens.starts)


class Encoder:
    """Encodes text in which nothing is a special token.

    It works on a copy of the tokenizer, so others can use the tokenizer at the same time.

    Args:
        tokenizer: a transformers tokenizer.

    Attributes:
        places: whether it knows the place of each token. If not, every token of a part spans the whole part.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        state = _state(tokenizer)
        self._backends = None if state is None else _backends(state)
        self.places = state is not None
        self._by_word = state is not None and state["model"]["type"] != "BPE"
        unknown = None if state is None else _unknown(state)  # ordinary text may become this token
        self._special = np.array(sorted(special - {unknown}), dtype=np.int32)

    def encode(self, text: str, place: Place = "start") -> Tokens:
        """Tokens of `text`, encoded as a whole."""
        text = _SURROGATE.sub("\ufffd", text)
        tokens = self._encode(text, place)
        # A model can hold its special tokens as words, as Unigram does. These are cut after their first character.
        for i in np.isin(tokens.ids, self._special).nonzero()[0][::-1]:
            start, end = int(tokens.starts[i]), int(tokens.ends[i])
            if end - start > 1:
                parts = [self._encode(text[a:b], "inside").moved(a) for a, b in ((start, start + 1), (start + 1, end))]
                tokens = _joined([tokens[:i], *parts, tokens[i + 1 :]])
        return tokens

    def stream(self, pieces: Iterable[str], place: Place = "start") -> Iterator[Tokens]:
        """`encode` of a text that comes in pieces. Yields its tokens part by part."""
        text = _Text(pieces)
        if self._backends is None:
            yield from self._paragraphs(text)
            return
        base = done = 0
        block, end = self._block(text, base, BLOCK, place)
        while text.reaches(end + 1):
            join = self._join(text, block, base, done, end)
            if join is None:
                block, end = self._block(text, base, base + 2 * (end - base), place)
                continue
            yield block[block.index(done) : block.index(join.cut)]
            base, done, block, end, place = join.start, join.cut, join.block, join.end, "inside"
            text.forget(base)
        yield block[block.index(done) :]

    def _block(self, text: _Text, start: int, end: int, place: Place) -> tuple[Tokens, int]:
        """Tokens of the text from `start` to `end`, and the place where they end: that of the text if it is shorter."""
        part = text[start:end]
        return self.encode(part, place).moved(start), start + len(part)

    def _join(self, text: _Text, block: Tokens, base: int, done: int, end: int) -> _Join | None:
        """The join after `block`, the tokens from `base` to `end`, or None. Those before `done` were yielded."""
        overlap, last_try = (end - base) // 8, end - base >= LONGEST
        possible = block.boundaries & (block.starts > done) & (block.starts <= end - overlap)
        changes = filter(text.changes, block.starts[possible & block.free][::-1].tolist())
        last = list(islice(changes, 8 * RUN + 1))
        starts = [last[back] for back in (0, 2 * RUN, 8 * RUN) if back < len(last)]
        bounds = block.starts[possible].tolist()
        for start in starts + bounds[-8:] if last_try else starts:
            following, reached = self._block(text, start, max(start + BLOCK, end + overlap), "inside")
            shared = _shared(block, following, start, end - overlap // 4)
            best = max(shared, key=lambda at: (shared[at], text.changes(at)), default=None)
            if best is not None and (last_try or (shared[best] and text.changes(best))):
                return _Join(start, best, following, reached)
        if not last_try:
            return None
        start = bounds[-1] if bounds else end  # one token is longer than LONGEST, or no two encodes agree
        return _Join(start, start, *self._block(text, start, start + BLOCK, "inside"))

    def _encode(self, text: str, place: Place) -> Tokens:
        if self._backends is None:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=True).input_ids
            spans, free = np.tile([0, len(text)], (len(ids), 1)), np.ones(len(ids), dtype=bool)
        else:
            encoded = self._backends[place].encode(text, add_special_tokens=False)
            ids, spans = encoded.ids, np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2)
            free = np.ones(len(ids), dtype=bool)
            if self._by_word:
                free[1:] = np.diff(np.array(encoded.word_ids, dtype=np.int64)) != 0
        return Tokens(np.array(ids, dtype=np.int32), spans[:, 0], spans[:, 1], free)

    def _paragraphs(self, text: _Text) -> Iterator[Tokens]:
        """Tokens of a text whose tokenizer has no offsets: cut after line ends at which a cut changes no token."""
        base, size = 0, BLOCK
        while text.reaches(base + 1):
            part = text[base : base + size]
            whole = self.encode(part, "inside")
            cut = part.rfind("\n", 0, len(part) // 2) + 1
            if text.reaches(base + size + 1) and size < LONGEST:
                first, rest = self.encode(part[:cut], "inside"), self.encode(part[cut:], "inside")
                if not cut or not np.array_equal(whole.ids, np.concatenate([first.ids, rest.ids])):
                    size *= 2
                    continue
                whole, part = first, part[:cut]
            yield whole.moved(base)
            base, size = base + len(part), BLOCK
            text.forget(base)


@dataclass(frozen=True)
class _Join:
    """The next block, from place `start` to `end`. Its tokens are used from `cut` on."""

    start: int
    cut: int
    block: Tokens
    end: int


class _Text:
    """A text that comes in pieces. Places count from its beginning. `forget` frees the text before a place."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces = iter(pieces)
        self._text = ""
        self._base = 0

    def reaches(self, end: int) -> bool:
        """Whether the text has at least `end` characters."""
        parts, length = [self._text], self._base + len(self._text)
        while length < end and (piece := next(self._pieces, None)) is not None:
            parts.append(piece)
            length += len(piece)
        if len(parts) > 1:
            self._text = "".join(parts)
        return length >= end

    def __getitem__(self, part: slice) -> str:
        self.reaches(part.stop)
        return self._text[part.start - self._base : part.stop - self._base]

    def changes(self, at: int) -> bool:
        """Whether the characters before and at this place are of different kinds."""
        at -= self._base
        return _kind(self._text[at - 1]) != _kind(self._text[at])

    def forget(self, before: int) -> None:
        self._text = self._text[max(0, before - self._base) :]
        self._base = max(self._base, before)


def _kind(character: str) -> int:
    return 2 * character.isspace() + character.isalnum()


def _shared(block: Tokens, following: Tokens, start: int, end: int) -> dict[int, bool]:
    """Places where two encodes can be joined, each with whether the tokens there are free in both.

    These are boundaries between `start` and `end` with a run of equal tokens around them.
    """
    _, left, right = np.intersect1d(block.starts, following.starts, return_indices=True)
    done = block.index(start)
    for i, j in zip(left.tolist(), right.tolist(), strict=True):
        if i < done:
            continue
        length = min(len(block) - i, len(following) - j)
        a, b = block[i : i + length], following[j : j + length]
        same = (a.ids == b.ids) & (a.starts == b.starts) & (a.ends == b.ends) & (a.ends <= end)
        run = length if same.all() else int(same.argmin())
        if run >= RUN:
            inner = slice(RUN // 2, run - RUN // 4)
            clean = block.boundaries[i : i + length] & following.boundaries[j : j + length]
            places = inner.start + clean[inner].nonzero()[0]
            return dict(zip(a.starts[places].tolist(), (a.free & b.free)[places].tolist(), strict=True))
        done = i + max(run, 1)
    return {}


def _joined(parts: list[Tokens]) -> Tokens:
    return Tokens(*(np.concatenate([getattr(part, name) for part in parts]) for name in _FIELDS))


def _state(tokenizer: Any) -> dict[str, Any] | None:
    """The tokenizer's backend as data. None if it has no backend that can be copied."""
    if not tokenizer.is_fast:
        return None
    try:
        state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception:  # a part of it is written in Python; tokenizers raises Exception itself
        return None
    return state | {"truncation": None, "padding": None, "post_processor": None}  # a post-processor trims offsets


def _backends(state: dict[str, Any]) -> dict[Place, Any]:
    """A backend for each place. Places with equal settings share one."""
    from tokenizers import Tokenizer

    made: list[tuple[Any, Any]] = []
    found: dict[Place, Any] = {}
    places: tuple[Place, ...] = "start", "segment", "inside"
    for place in places:
        parts = {name: _without_prefix(state[name], place) for name in ("normalizer", "pre_tokenizer")}
        backend = next((backend for key, backend in made if key == parts), None)
        if backend is None:
            backend = Tokenizer.from_str(json.dumps(state | parts))
            backend.encode_special_tokens = True
            made.append((parts, backend))
        found[place] = backend
    return found


def _without_prefix(part: Any, place: Place) -> Any:
    """The same normalizer or pre-tokenizer, but without the space that it puts before text at this place."""
    if isinstance(part, list):
        kept = [p for p in part if not (place == "inside" and isinstance(p, dict) and p.get("type") == "Prepend")]
        return [_without_prefix(p, place) for p in kept]
    if not isinstance(part, dict) or place == "start":
        return part
    if part.get("type") == "Prepend" and place == "inside":
        return None
    changed = {name: _without_prefix(value, place) for name, value in part.items()}
    if part.get("type") == "Metaspace" and (place == "inside" or part.get("prepend_scheme") == "first"):
        changed |= {"prepend_scheme": "never"}
    if part.get("type") == "ByteLevel" and place == "inside":
        changed |= {"add_prefix_space": False}
    return changed


def _unknown(state: dict[str, Any]) -> int | None:
    """The id that stands for unknown text."""
    model = state["model"]
    if "unk_id" in model:
        return model["unk_id"]
    return model["vocab"].get(model.get("unk_token"))
