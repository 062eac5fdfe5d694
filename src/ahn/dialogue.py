"""Documents, questions and answers as token ids, in pieces that can be read before the next piece is known.

Joined, the pieces are the ids of the whole conversation in the tokenizer's own chat template. So a document can be read
today and asked about tomorrow. Nothing here knows a model family: the template is rendered once around placeholders,
and the text between them is used.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from ahn.errors import ConfigError
from ahn.tokens import Encoded, Encoder

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

SEPARATOR, LABEL = "\n\n", "Question: "
"""Both stand between a document and the question about it, in one user turn. The tokens of the separator may depend on
the text after it, so that text is fixed."""

NOT_FOUND = "not found in the text"
"""The answer to a question that the text does not answer."""

_FIRST, _ANSWER, _SECOND = "ahnfirst", "ahnanswer", "ahnsecond"
_CUT = "\ufdd0"  # a code point that no text has; it marks the cuts in a rendered conversation
_RENDERING_S = 5  # a template that takes longer is assumed never to end
_CONTEXT = "a"  # stands for the text before a piece that does not begin with a special token

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def readable(text: str) -> str:
    """`text` without lone surrogates, which no tokenizer can read.

    Python keeps undecodable bytes of a command line as surrogates: these are decoded as UTF-8. Others become U+FFFD.
    """
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text)


def from_json(text: str) -> Any:
    """The value of a JSON text. Strings in it are made `readable`, because JSON can escape half a surrogate pair.

    Raises:
        ValueError, RecursionError: it is no JSON, or nested too deeply.
    """
    value = json.loads(text)
    if _ESCAPED_SURROGATE.search(text):
        value = json.loads(readable(json.dumps(value, ensure_ascii=False)))
    return value


def plain(tokenizer: Any, text: str | list[str], special: bool = False, **options: Any) -> Any:
    """`tokenizer(text)`, but a string such as `<|im_end|>` is read as its characters, never as the special token.

    Args:
        special: whether to add the tokens that the tokenizer puts around a text.
        options: further arguments of the tokenizer.
    """
    text = readable(text) if isinstance(text, str) else [readable(one) for one in text]
    return tokenizer(text, add_special_tokens=special, split_special_tokens=True, verbose=False, **options)


class Dialogue:
    """Turns the texts of a conversation into token ids.

    One of `open` and `start` comes first; `question` follows `open`; `turn` follows an answer. All return int64
    tensors of shape [1, T]. Without a chat template, or with one that cannot be used, the texts are written as
    "Question: ... Answer:".

    Strings such as `<|im_end|>` inside a document or a question are read as the characters they are, never as the
    special token. Lone surrogates are read as U+FFFD.

        dialogue = ahn.Dialogue(ahn.load_tokenizer("smollm2-135m"))
        cache = ahn.read(model, dialogue.open(document))
        ids = ahn.generate(model, dialogue.question("Who is the narrator?"), cache.fork(), max_new_tokens=100)

    Args:
        tokenizer: a transformers tokenizer.

    Attributes:
        has_template: whether the tokenizer's chat template is used.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        words = [re.escape(str(token)) for token in special]
        self._special = re.compile(f"(?={'|'.join(words)})") if special else None  # lookahead: overlaps count too
        space = {True: r"\s*", False: ""}  # some special tokens absorb the spaces around them
        words = [f"{space[token.lstrip]}{re.escape(str(token))}{space[token.rstrip]}" for token in special]
        self._control = re.compile("|".join(sorted(words, key=len, reverse=True)) or "(?!)")
        template = _template_pieces(tokenizer)
        self.has_template = template is not None
        if template is None:
            begin = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
            template = tokenizer.bos_token if begin else "", "\nAnswer:", SEPARATOR
        self._label = "" if self.has_template else LABEL
        self._prefix, self._suffix, self._between = template

    @classmethod
    def of(cls, tokenizer: Any) -> Dialogue:
        """The dialogue of a tokenizer with its present template, kept because making one copies the tokenizer."""
        return _dialogue_of(tokenizer, str(getattr(tokenizer, "chat_template", None)))

    @property
    def opening(self) -> int:
        """Tokens of the template in front of a document."""
        return len(self._template(self._prefix).ids)

    def render(self, messages: Sequence[dict[str, str]], ask: bool = False) -> list[str]:
        """A whole conversation as text by the chat template, in pieces to be tokenised one by one.

        The cuts lie inside those strings of the messages that would be read as special tokens.

        Args:
            ask: whether the text ends where the next answer begins.

        Raises:
            ConfigError: the template cannot be used for these messages.
        """
        marked = [message | {"content": _CUT.join(self.inert(message["content"]))} for message in messages]
        try:
            return _rendered(self.tokenizer, marked, ask).split(_CUT)
        except Exception as error:  # a template can raise anything
            raise ConfigError(f"the chat template cannot be used for these messages: {_named(error)}") from error

    def open(self, document: str) -> Tensor:
        """Everything up to and including the document and the separator after it."""
        return _tensor(self.stream([document]))

    def stream(self, pieces: Iterable[str]) -> Iterator[Encoded]:
        """`open` of a document that comes in pieces, in constant memory.

        Yields:
            tokens. Their starts count from the document's first character; those of the template are negative.
        """
        yield from self._document(self._prefix, pieces)

    def stream_more(self, pieces: Iterable[str], separated: bool = True) -> Iterator[Encoded]:
        """A further document after an open one, in constant memory.

        Args:
            separated: whether the document before was read to its end.
        """
        before = _CONTEXT + SEPARATOR
        yield from self._document(before, pieces, context=before if separated else _CONTEXT)

    def question(self, text: str, passages: str = "") -> Tensor:
        """The question about an open document, up to where the answer begins.

        Args:
            passages: text to read again before the question.
        """
        before = _CONTEXT + SEPARATOR
        return self._ids(before, _asked(text, LABEL, passages), self._suffix, context=before)

    def start(self, text: str) -> Tensor:
        """The first question of a conversation without a document, up to where the answer begins."""
        return self._ids(self._prefix, _asked(text, self._label), self._suffix)

    @property
    def closing(self) -> int:
        """Number of tokens between a question and its answer."""
        return len(self._template(self._suffix).ids)

    def turn(self, text: str, answer: Sequence[int] | Tensor = (), passages: str = "") -> Tensor:
        """A further question, up to where its answer begins.

        Args:
            text: the question.
            answer: ids generated last. If they end with the token that closes the turn, it is not repeated.
            passages: text to read again before the question.
        """
        asked = _asked(text, LABEL if passages else self._label, passages)
        ids = self._ids(_CONTEXT + self._between, asked, self._suffix, context=_CONTEXT)
        last = [int(i) for i in answer][-1:]
        return ids[:, 1:] if last == ids[0, :1].tolist() else ids

    def _document(self, before: str, pieces: Iterable[str], context: str = "") -> Iterator[Encoded]:
        text = Stripped(map(readable, pieces))
        for part in self._parts(before, text, SEPARATOR, context, LABEL):
            yield Encoded(part.ids, part.starts - len(before) + text.skipped)

    def _ids(self, before: str, text: str, after: str, context: str = "") -> Tensor:
        return _tensor(self._parts(before, [readable(text)], after, context))

    def _parts(
        self, before: str, text: Iterable[str], after: str, context: str = "", upto: str = ""
    ) -> Iterator[Encoded]:
        """Tokens of `before + text + after + upto`, without those of `context` at the start and of `upto` at the end.

        Special tokens count in `before` and `after`, which are the template's, but not in `text`. So the stretch from
        the last special token before the text to the first one after it is encoded without any.
        """
        *_, low = 0, *(match.end() for match in self._control.finditer(before))
        high = match.start() if (match := self._control.search(after)) else len(after)
        skip = len(context)
        if low:
            yield self._template(before[:low], skip)
        if not self._encoder.places:  # pieces are then tokenised without their surroundings
            before, upto, skip = before[:low] + before[max(low, skip) :], "", 0
        end: int | None = None

        def inner() -> Iterator[str]:
            nonlocal end
            length = low
            for piece in chain([before[low:]], text, [after[:high], upto]):
                length += len(piece)
                yield piece
            end = length - len(upto)

        for tokens in self._encoder.stream(inner(), "segment" if low else "start"):
            tokens = tokens.moved(low)
            # Only the ends are compared: a tokenizer may trim spaces off the starts.
            inside = tokens.ends > skip
            if end is not None:  # the text has ended: these are the last tokens
                inside &= tokens.ends <= end
            yield tokens[inside]
        if high < len(after):
            yield self._template(after[high:])

    def inert(self, text: str) -> list[str]:
        """`text`, cut inside each string that would be read as a special token. Ordinary text stays one piece."""
        text = readable(text).replace(_CUT, "\ufffd")
        cuts = [m.start() + 1 for m in self._special.finditer(text)] if self._special else []
        return [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    def _template(self, text: str, skip: int = 0) -> Encoded:
        """Tokens of the template's own text after its first `skip` characters. Special tokens count in it."""
        options = {"add_special_tokens": False, "verbose": False}
        if not self.tokenizer.is_fast:
            ids = np.array(self.tokenizer(text[skip:], **options).input_ids, dtype=np.int32)
            return Encoded(ids, np.zeros(len(ids), dtype=np.int64))
        encoded = self.tokenizer(text, return_offsets_mapping=True, **options)
        spans = np.array(encoded.offset_mapping, dtype=np.int64).reshape(-1, 2)
        first = int(np.argmax(spans[:, 1] > skip)) if (spans[:, 1] > skip).any() else len(spans)
        return Encoded(np.array(encoded.input_ids, dtype=np.int32)[first:], spans[first:, 0])

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer)


@lru_cache(maxsize=4)
def _dialogue_of(tokenizer: Any, template: str) -> Dialogue:
    return Dialogue(tokenizer)


class Stripped:
    """The pieces of a text without the spaces around the whole. `skipped`: characters left out at the start."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces = pieces
        self.skipped = 0

    def __iter__(self) -> Iterator[str]:
        begun, space = False, ""
        for piece in self._pieces:
            if not begun:
                short = piece.lstrip()
                self.skipped += len(piece) - len(short)
                piece, begun = short, bool(short)
            words = piece.rstrip()
            if words:
                yield space + words
                space = piece[len(words) :]
            else:
                space += piece


def _tensor(parts: Iterable[Encoded]) -> Tensor:
    """The ids of all parts, int64 [1, T]."""
    import torch

    return torch.from_numpy(np.concatenate([part.ids for part in parts]).astype(np.int64))[None]


def _asked(text: str, label: str, passages: str = "") -> str:
    if not text.strip():
        raise ConfigError(f"question {text!r}: expected some text")
    return (passages + SEPARATOR if passages else "") + label + text.strip()


def _template_pieces(tokenizer: Any) -> tuple[str, str, str] | None:
    """Text before the first user message, from a user message to its answer, from an answer to the next message."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [
        {"role": "user", "content": _FIRST},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _SECOND},
    ]
    try:
        text = _rendered(tokenizer, messages, ask=True)
    except Exception as error:  # an expression of the template can raise anything
        _warn(_named(error))
        return None
    pieces = re.split(f"{_FIRST}|{_ANSWER}|{_SECOND}", text)
    if len(pieces) != 4:
        _warn("it drops, repeats or rewrites messages")
        return None
    return pieces[0], pieces[3], pieces[2]


@cache
def _warn(reason: str) -> None:
    """Log a warning, once for each reason."""
    logger.warning("the chat template cannot be used (%s): texts are read as Question: ... Answer:", reason)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _rendered(tokenizer: Any, messages: Sequence[dict[str, str]], ask: bool) -> str:
    """The template's text of a conversation. Raises the template's own errors, and TimeoutError if it does not end."""
    with _within(_RENDERING_S):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    return readable(text)


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in a template that uses more processor time. Works in any thread and on any system."""
    end, before = time.thread_time() + seconds, sys.gettrace()

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if time.thread_time() > end:
            raise TimeoutError(f"not done after {seconds} s")
        return trace if frame.f_code.co_filename == "<template>" else None  # line by line in the template only

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
