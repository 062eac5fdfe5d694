"""Asking a memory: find the few passages that a question asks for, read them again in front of it, and answer.

The answer is generated from the passages alone: with the window in front of them it is worse (docs/recall.md). Where no
passage is read again it comes from a fork of the memory. Either way the memory is as it was before.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ahn.dialogue import NOT_FOUND, SEPARATOR, Dialogue
from ahn.engine.generate import generate
from ahn.engine.prefill import check_cache, read
from ahn.errors import ConfigError
from ahn.memory.cache import AHNCache
from ahn.recall import finders, support
from ahn.recall.passages import Passages
from ahn.recall.question import Question, apart
from ahn.tokens import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

RECALL = 512  # tokens that are read again
FINDER = "fused"
UNSUPPORTED = ("say", "answer")  # where the text supports no answer
INTRODUCTION = "Passages from the text:" + SEPARATOR


class Recall(NamedTuple):
    """How passages are found, and how much of the text is read again.

    Attributes:
        tokens: to read again at most, 0 for none; None: RECALL if the memory has keys of retrieval heads, else none.
        finder: a name in `ahn.recall.finders.names()`.
        rounds: 1, or 2 to look for the second half of the passages with the best of the first in mind.
        judge: look for support too, if passages are read again and the adapter has a calibration.
    """

    tokens: int | None = RECALL
    finder: str = FINDER
    rounds: int = 1
    judge: bool = True


@dataclass(frozen=True)
class Source:
    """A passage that was read again.

    Attributes:
        text: of the passage. start, end: its tokens in all that was read, `start` to `end` - 1.
        document, page, offset: where it begins, as in `ahn.memory.archive.Place`; None where they are not known.
        last_page: on which it ends, `page` if it is on one; None where there are no pages.
    """

    text: str
    start: int
    end: int
    document: str | None = None
    page: int | None = None
    offset: int | None = None
    last_page: int | None = None

    def __str__(self) -> str:
        return f"{self.place}: {shorten(self.text, 72, placeholder=' ...')}"

    @property
    def place(self) -> str:
        """Document, page and character as words."""
        where = "" if self.document is None else f"{self.document}, "
        if self.page is not None:
            several = self.last_page not in (None, self.page)
            where += f"pages {self.page}-{self.last_page}, " if several else f"page {self.page}, "
        return where + (f"token {self.start:,}" if self.offset is None else f"character {self.offset:,}")


@dataclass(frozen=True)
class Answer:
    """Attributes:
    text: of the answer. ids: its tokens, int64 [T]. sources: the passages that were found, in the order of the text.
    support: how far the text supports an answer (`Found.support`).
    """

    text: str
    ids: Tensor
    sources: tuple[Source, ...]
    support: float | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def found(self) -> bool:
        """Whether the text supports an answer, as far as that is known."""
        return self.support is None or self.support >= 0


@dataclass(frozen=True)
class Found:
    """The passages that an answer can be taken from, and whether they support one.

    Attributes:
        sources: passages to read again, in the order of the text.
        support: how well passages and memory together support an answer, in the unit of the adapter's calibration.
            Below 0 they do not support one. None: not known.
    """

    sources: tuple[Source, ...] = ()
    support: float | None = None

    @property
    def supported(self) -> bool:
        return self.support is None or self.support >= 0


def ask(
    model: PreTrainedModel,
    tokenizer: Any,
    memory: AHNCache | str | os.PathLike[str],
    question: str,
    recall: int | None = None,
    *,
    finder: str = FINDER,
    rounds: int = 1,
    unsupported: str = "say",
    max_new_tokens: int = 256,
    **options: Any,
) -> Answer:
    """Answer a question about the text that `memory` has read.

    The answer comes from passages that are read again. Where none is, it comes from the memory.

    Where the adapter has a calibration (`ahn.recall.support`) and the text supports no answer, the answer is NOT_FOUND,
    and nothing is generated.

    Args:
        model, tokenizer: of the memory.
        memory: returned by `ahn.read`, or loaded from a file. It is not changed. The path of a file is loaded for this
            one question (`AHNCache.load`).
        question: at least one word.
        recall: tokens to read again at most; 0: none. Default: 512 if the memory has keys of retrieval heads, else 0.
        finder: how passages are found (`ahn.recall.finders.names()`).
        rounds: 2 reads the first half of the passages, then looks for the second half with the best of
            them in mind. This is meant for questions whose answer is spread over several passages.
        unsupported: "answer" generates an answer although the text supports none; "say" does not.
        max_new_tokens, options: as `ahn.generate`.

    Raises:
        MemoryFileError: as `AHNCache.load`, of a path.
        ConfigError: an empty question or memory, no memory, an unknown finder or word for `unsupported`, `recall` for a
            memory without an archive or of another tokenizer, a question longer than the window, or more tokens to read
            again than it holds beside it.
    """
    if unsupported not in UNSUPPORTED:
        raise ConfigError(f"unsupported={unsupported!r}: expected one of {', '.join(UNSUPPORTED)}")
    memory = AHNCache.load(Path(memory), model) if isinstance(memory, str | os.PathLike) else check_cache(memory)
    if not memory.tokens_seen:
        raise ConfigError("the memory is empty: expected one that has read a document")
    found = search(model, tokenizer, memory, question, Recall(recall, finder, rounds))
    if not found.supported and unsupported == "say":
        return Answer(NOT_FOUND, not_found(tokenizer), found.sources, found.support)
    if found.sources:
        ids, cache = alone(tokenizer, question, found.sources), AHNCache(model)
    else:
        ids, cache = Dialogue.of(tokenizer).question(question), apart(memory)
    if "pad_token_id" not in options:
        options["pad_token_id"] = tokenizer.eos_token_id
    new = generate(model, ids, cache, max_new_tokens=max_new_tokens, **options)[0].cpu()
    return Answer(tokenizer.decode(new, skip_special_tokens=True).strip(), new, found.sources, found.support)


def alone(tokenizer: Any, question: str, sources: tuple[Source, ...]) -> Tensor:
    """Ids [1, T] of a dialogue about these passages and nothing else, up to where the answer to the question begins."""
    dialogue = Dialogue.of(tokenizer)
    return torch.cat([dialogue.open(as_text(sources)), dialogue.question(question)], 1)


def not_found(tokenizer: Any) -> Tensor:
    """Tokens of NOT_FOUND, int64 [T]."""
    return torch.tensor(tokenizer(NOT_FOUND, add_special_tokens=False, verbose=False).input_ids)


def find(
    model: PreTrainedModel,
    tokenizer: Any,
    memory: AHNCache,
    question: str,
    recall: int | None = None,
    *,
    finder: str = FINDER,
    rounds: int = 1,
) -> tuple[Source, ...]:
    """The passages that a question asks for, in the order of the text; arguments and errors as of `ask`."""
    return search(model, tokenizer, memory, question, Recall(recall, finder, rounds, judge=False)).sources


def search(
    model: PreTrainedModel,
    tokenizer: Any,
    memory: AHNCache,
    question: str,
    how: Recall,
    prompt: Callable[[str, str], Tensor] | None = None,
) -> Found:
    """The passages as of `find`, and whether they support an answer.

    Args:
        prompt: of a chat, which goes on from the memory: ids [1, T] of a question and the passages in front of it, as
            they follow the memory. Passages that the memory still holds exactly are then not read again. None: the
            answer comes from the passages alone (`alone`).
    """
    check(tokenizer, memory, question, how)
    tokens = how.tokens
    if tokens is None:  # a base for which nobody has chosen heads may answer worse with passages than without
        tokens = RECALL if memory.archive is not None and memory.archive.keys is not None else 0
    if memory.archive is None or not tokens:
        return Found()
    passages, asked = Passages.of(memory.archive, tokenizer), Question(question, model, tokenizer, memory)
    gone = None if prompt is None else forgotten(passages, memory, tokens + _length(tokenizer, question))
    taken = rank(passages, asked, how._replace(tokens=tokens), gone)
    taken = _fitting(tokenizer, memory, question, passages, taken)
    found = sources(passages, taken)
    calibration = None if model.ahn_retrieval is None else model.ahn_retrieval.calibration
    if calibration is None or not how.judge:
        return Found(found)
    held = [] if gone is None else np.flatnonzero(~gone).tolist()
    signals = support.of_passages(passages, [*taken, *held], asked)
    if "said" in calibration.signals:
        text = support.check(question)
        if prompt is None:
            ids, cache = alone(tokenizer, text, found), AHNCache(model)
        else:
            ids, cache = prompt(text, as_text(found)), apart(memory)
        logits = read(model, ids, cache).last_logits
        assert logits is not None
        signals |= support.said(tokenizer, logits)[0]
    return Found(found, calibration.margin(signals))


def check(tokenizer: Any, memory: AHNCache, question: str, how: Recall) -> None:
    """Raises ConfigError if `search` cannot be asked this, which is known before anything is read."""
    recall, rounds = how.tokens, how.rounds
    finders.check_name(how.finder)
    if isinstance(recall, bool) or not (recall is None or (isinstance(recall, int) and recall >= 0)):
        raise ConfigError("{recall}: expected a number of tokens, 0 for none", recall=recall)
    if isinstance(rounds, bool) or rounds not in (1, 2):
        raise ConfigError("{rounds}: expected 1 or 2", rounds=rounds)
    if not question.strip():
        raise ConfigError(f"question {question!r}: expected some text")
    if memory.archive is None:
        if recall:
            raise ConfigError(
                "{recall}: the memory has no archive to find passages in; expected one that was read with {archive}",
                recall=recall,
                archive="text",
            )
    elif memory.archive.tokenizer not in (None, digest(tokenizer)):
        raise ConfigError(
            "the archive was read with another tokenizer: expected the one of the base that the memory is of"
        )
    length, window = _length(tokenizer, question), memory.config.window
    if length > window:
        raise ConfigError(f"question of {length:,} tokens with its template: expected at most the window of {window:,}")
    if recall and recall > window - length:
        raise ConfigError(
            f"{{recall}}: the window of {window:,} tokens holds the question, which has {length:,}, and "
            f"{window - length:,} more: expected at most so many",
            recall=recall,
        )


def _length(tokenizer: Any, question: str, passages: str = "") -> int:
    """Tokens of a question with its template."""
    return int(Dialogue.of(tokenizer).question(question, passages).shape[1])


def _fitting(tokenizer: Any, memory: AHNCache, question: str, passages: Passages, taken: list[int]) -> list[int]:
    """Those of the passages `taken`, best first, that the window holds together with the question."""
    for count in range(len(taken), 0, -1):
        text = as_text(sources(passages, taken[:count]))
        if _length(tokenizer, question, text) <= memory.config.window:
            break
    else:
        count = 0
    if count < len(taken):
        logger.warning(
            "%d of %d passages are read again: the window of %s tokens holds no more of them beside the question",
            count, len(taken), f"{memory.config.window:,}",
        )  # fmt: skip
    return taken[:count]


def rank(passages: Passages, question: Question, how: Recall, allowed: np.ndarray | None = None) -> list[int]:
    """Passages for a question by their numbers, of `how.tokens` at most, those of the first round first.

    No text is taken twice, nor one that a passage that is not allowed has too.

    `allowed`: bool [P], the passages to choose from; None: all. The chat template is never among them.
    """
    assert how.tokens is not None
    allowed = passages.read_as_text if allowed is None else allowed & passages.read_as_text
    originals = passages.originals
    allowed = allowed & ~np.isin(originals, originals[~allowed])
    taken: list[int] = []
    for part in range(1, how.rounds + 1):
        if not allowed.any():
            break
        if taken:  # words of more passages would outweigh those of the question
            question = question.after(passages.texts[taken[0]].strip())
        scores = finders.get(how.finder)().scores(passages, question)
        scores = np.where(allowed, scores, -np.inf)
        scores[np.isin(originals, originals[taken])] = -np.inf
        order = np.argsort(-scores, kind="stable")
        scores[np.delete(order, np.unique(originals[order], return_index=True)[1])] = -np.inf  # all but the best copy
        taken += best(scores, passages.lengths, how.tokens * part // how.rounds - int(passages.lengths[taken].sum()))
    if not taken and allowed.any():
        logger.warning("nothing is read again: the best passage has more than %s tokens", f"{how.tokens:,}")
    return taken


def best(scores: np.ndarray, lengths: np.ndarray, budget: int) -> list[int]:
    """The best passages that together have at most `budget` tokens, best first; none that scores -inf."""
    taken: list[int] = []
    for index in np.argsort(-scores, kind="stable"):
        if scores[index] == -np.inf or lengths[index] > budget:
            break
        taken.append(int(index))
        budget -= int(lengths[index])
    return taken


def as_text(sources: tuple[Source, ...]) -> str:
    """Passages as they are read again, in front of a question."""
    return INTRODUCTION + SEPARATOR.join(source.text.strip() for source in sources) if sources else ""


def forgotten(passages: Passages, memory: AHNCache, tokens: int) -> np.ndarray:
    """Which passages sinks and window will not hold after `tokens` more, bool [P]."""
    starts, ends = passages.bounds[:-1], passages.bounds[1:]
    config = memory.config
    return (ends > config.sinks) & (starts < len(passages.archive) + tokens - config.window)


def sources(passages: Passages, taken: list[int]) -> tuple[Source, ...]:
    """Passages by number, in the order of the text."""
    return tuple(_source(passages, index) for index in sorted(taken))


def _source(passages: Passages, index: int) -> Source:
    text, place = passages.texts[index], passages.place(index)
    start, end = (int(bound) for bound in passages.bounds[index : index + 2])
    if place is None:
        return Source(text, start, end)
    where, last_page = place
    return Source(text, start, end, where.document, where.page, where.offset, last_page)
