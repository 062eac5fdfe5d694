"""Documents, questions and answers as token ids, in pieces that can be read before the next piece is known.

The pieces put together are the ids of the whole conversation in the tokenizer's own chat template, so a document can
be read today and asked about tomorrow. Nothing here knows a model family: the template is rendered once around
placeholders, and the text between them is all that is needed.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from ahn.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

SEPARATOR, LABEL = "\n\n", "Question: "
"""Between a document and the question about it, in the same user turn. How the separator is cut into tokens may depend
on what follows it, so what follows is fixed."""

_FIRST, _ANSWER, _SECOND = "ahnfirst", "ahnanswer", "ahnsecond"
_CUT = "\ufdd0"  # no character: it marks where a rendered conversation is cut
_RENDERING_S = 5  # a template that takes longer is taken for one that never ends
_CONTEXT = "a"  # stands for whatever text came before, where a piece does not begin with a special token


def readable(text: str) -> str:
    """`text` without lone surrogates, which no tokenizer can read. Bytes that Python kept in an argument are decoded as
    UTF-8; the rest becomes U+FFFD."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text)


def plain(tokenizer: Any, text: str | list[str], special: bool = False, **options: Any) -> Any:
    """`tokenizer(text)`, where a string such as `<|im_end|>` is the characters that it has, never the special token.

    Args:
        special: add the tokens that the tokenizer puts around a text. options: further ones of the tokenizer.
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
        special = [re.escape(str(token)) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile(f"(?={'|'.join(special)})") if special else None  # lookahead: overlaps count too
        template = _template_pieces(tokenizer)
        self.has_template = template is not None
        if template is None:
            begin = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
            template = tokenizer.bos_token if begin else "", "\nAnswer:", SEPARATOR
        self._label = "" if self.has_template else LABEL
        self._prefix, self._suffix, self._between = template

    def render(self, messages: Sequence[dict[str, str]], ask: bool = False) -> list[str]:
        """The chat template's text of a whole conversation, in pieces to be tokenised one by one: cut inside whatever
        a message has that would be read as a special token. `ask`: up to where the next answer begins.

        Raises:
            ConfigError: the template cannot be used for these messages.
        """
        marked = [message | {"content": _CUT.join(self.inert(message["content"]))} for message in messages]
        try:
            return _rendered(self.tokenizer, marked, ask).split(_CUT)
        except Exception as error:  # whatever a template stumbles over
            raise ConfigError(f"the chat template cannot be used for these messages: {_named(error)}") from error

    def open(self, document: str) -> Tensor:
        """Everything up to and including the document and the separator after it."""
        return self._ids(self._prefix, document.strip(), SEPARATOR, upto=LABEL)

    def question(self, text: str) -> Tensor:
        """The question about an open document, to the point where the answer begins."""
        before = _CONTEXT + SEPARATOR
        return self._ids(before, _asked(text, LABEL), self._suffix, context=before)

    def start(self, text: str) -> Tensor:
        """The first question of a conversation without a document, to the point where the answer begins."""
        return self._ids(self._prefix, _asked(text, self._label), self._suffix)

    def turn(self, text: str, answer: Sequence[int] | Tensor = ()) -> Tensor:
        """A further question, to the point where its answer begins.

        Args:
            text: the question.
            answer: ids generated last. Where they end with the token that closes the turn, it is not repeated.
        """
        ids = self._ids(_CONTEXT + self._between, _asked(text, self._label), self._suffix, context=_CONTEXT)
        last = [int(i) for i in answer][-1:]
        return ids[:, 1:] if last == ids[0, :1].tolist() else ids

    def _ids(self, before: str, text: str, after: str, context: str = "", upto: str = "") -> Tensor:
        """Ids of `before + text + after`, less those of `context` in front and of `upto` behind.

        `before` and `after` are the template's, where special tokens count; in `text` they do not.
        """
        import torch

        pieces = self.inert(text)
        pieces[0] = before + pieces[0]
        pieces[-1] += after
        ids = []
        for i, piece in enumerate(pieces):
            skip = len(context) if i == 0 else 0
            ids += self._encode(piece, skip, upto if i == len(pieces) - 1 else "")
        return torch.tensor([ids], dtype=torch.int64)

    def inert(self, text: str) -> list[str]:
        """`text`, cut inside each string that would be read as a special token. Ordinary text stays in one piece."""
        text = readable(text).replace(_CUT, "\ufffd")
        cuts = [m.start() + 1 for m in self._special.finditer(text)] if self._special else []
        return [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    def _encode(self, text: str, skip: int, upto: str) -> list[int]:
        options = {"add_special_tokens": False, "verbose": False}
        if not self.tokenizer.is_fast:  # no offsets: the pieces are tokenised as if nothing stood around them
            return self.tokenizer(text[skip:], **options).input_ids
        encoded = self.tokenizer(text + upto, return_offsets_mapping=True, **options)
        # Only the ends are compared: a tokenizer may trim spaces off the starts.
        ends = [end for _, end in encoded.offset_mapping]
        first = next((i for i, end in enumerate(ends) if end > skip), len(ends)) if skip else 0
        last = next((i + 1 for i in reversed(range(len(ends))) if ends[i] <= len(text)), 0) if upto else len(ends)
        return encoded.input_ids[first:last]


def _asked(text: str, label: str) -> str:
    if not text.strip():
        raise ConfigError(f"question {text!r}: expected some text")
    return label + text.strip()


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
    except Exception as error:  # jinja's own, and whatever an expression of the template raises
        _warn(_named(error))
        return None
    pieces = re.split(f"{_FIRST}|{_ANSWER}|{_SECOND}", text)
    if len(pieces) != 4:
        _warn("it drops, repeats or rewrites messages")
        return None
    return pieces[0], pieces[3], pieces[2]


@cache
def _warn(reason: str) -> None:
    """Once for each reason."""
    logger.warning("the chat template cannot be used (%s): texts are read as Question: ... Answer:", reason)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _rendered(tokenizer: Any, messages: Sequence[dict[str, str]], ask: bool) -> str:
    """Raises whatever the template raises, TimeoutError for one without an end."""
    with _within(_RENDERING_S):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    return readable(text)


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in a template that takes more of the processor's time, in any thread and on any system."""
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
