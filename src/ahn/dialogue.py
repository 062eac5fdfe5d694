"""Documents, questions and answers as token ids, in pieces that can be read before the next piece is known.

The pieces put together are the ids of the whole conversation in the tokenizer's own chat template, so a document can
be read today and asked about tomorrow. Nothing here knows a model family: the template is rendered once around
placeholders, and the text between them is all that is needed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ahn.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

SEPARATOR, LABEL = "\n\n", "Question: "
"""Between a document and the question about it, in the same user turn. How the separator is cut into tokens may depend
on what follows it, so what follows is fixed."""

_FIRST, _ANSWER, _SECOND = "ahnfirst", "ahnanswer", "ahnsecond"
_CONTEXT = "a"  # stands for whatever text came before, where a piece does not begin with a special token


class Dialogue:
    """Turns the texts of a conversation into token ids.

    One of `open` and `start` comes first; `question` follows `open`; `turn` follows an answer. All return int64
    tensors of shape [1, T]. A tokenizer without a chat template gets "Question: ... Answer:".

    Strings such as `<|im_end|>` inside a document or a question are read as the characters they are, never as the
    special token.

    Args:
        tokenizer: a transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        special = [re.escape(str(token)) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile(f"(?={'|'.join(special)})") if special else None  # lookahead: overlaps count too
        template = _template_pieces(tokenizer)
        if plain := template is None:
            begin = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
            template = tokenizer.bos_token if begin else "", "\nAnswer:", SEPARATOR
        self._label = LABEL if plain else ""
        self._prefix, self._suffix, self._between = template

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

        pieces = self._inert(text)
        pieces[0] = before + pieces[0]
        pieces[-1] += after
        ids = []
        for i, piece in enumerate(pieces):
            skip = len(context) if i == 0 else 0
            ids += self._encode(piece, skip, upto if i == len(pieces) - 1 else "")
        return torch.tensor([ids], dtype=torch.int64)

    def _inert(self, text: str) -> list[str]:
        """`text`, cut inside each string that would be read as a special token. Ordinary text stays in one piece."""
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
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pieces = re.split(f"{_FIRST}|{_ANSWER}|{_SECOND}", text)
    if len(pieces) != 4:  # a template that drops, repeats or rewrites messages
        return None
    return pieces[0], pieces[3], pieces[2]
