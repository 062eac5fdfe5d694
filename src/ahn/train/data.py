"""Packs sources (`ahn.train.sources`) into rows of equally many tokens, without padding."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ahn.dialogue import Dialogue
from ahn.errors import BaseModelError, DocumentError
from ahn.train.records import Text, from_record, from_text
from ahn.train.rows import Rows, cache_key, cached
from ahn.train.sources import read_records, read_text

CHARACTERS_AT_ONCE = 1 << 20  # for one call of the tokenizer, which works on several texts in parallel


def rows(
    sources: list[str],
    tokenizer: Any,
    length: int,
    limit: int | None = None,
    seed: int = 0,
    cache: Path | None = None,
) -> Rows:
    """Read sources and pack each into rows.

    Args:
        sources: paths or hub datasets (`ahn.train.sources`).
        tokenizer: of the base.
        length: tokens of a row.
        limit: tokens of each source, at most, rounded up to whole rows. None: all.
        seed: of the order of the questions about a document.
        cache: folder that keeps rows which took long to make. The same source, tokenizer and settings find them there.

    Raises:
        DocumentError: a source is missing, empty, not text, of no known shape, or has records that are not in UTF-8;
            or it does not fill a row.
        BaseModelError: the tokenizer has no end-of-text token or no chat template, and the sources need it.
    """
    parts = []
    for source in sources:
        pack = partial(_pack, source, tokenizer, length, limit, seed)
        key = cache and cache_key(source, tokenizer, length, limit, seed)
        parts.append(cached(cache / f"{key}.safetensors", pack) if cache and key else pack())
    return Rows(torch.cat([part.ids for part in parts]), torch.cat([part.counts for part in parts]))


def _pack(source: str, tokenizer: Any, length: int, limit: int | None, seed: int) -> Rows:
    ids, counts = [], []
    packed: list[int] = []
    wanted: list[bool] = []
    seen = 0
    for text_ids, text_counts in _tokens(_texts(source, Dialogue(tokenizer), seed), tokenizer):
        packed += text_ids
        wanted += text_counts
        whole = len(packed) // length * length
        if whole:
            ids.append(torch.tensor(packed[:whole], dtype=torch.int32).view(-1, length))
            counts.append(torch.tensor(wanted[:whole]).view(-1, length))
            packed, wanted = packed[whole:], wanted[whole:]
            seen += whole
        if limit is not None and seen >= limit:
            break
    if not seen:
        raise DocumentError(
            f"{source}: {len(packed)} tokens to train on: expected at least the {length} of one row"
            + ("" if packed else "; records need a text, or a chat an answer")
        )
    most = None if limit is None else -(-limit // length)
    return Rows(torch.cat(ids)[:most], torch.cat(counts)[:most])


def _texts(source: str, dialogue: Dialogue, seed: int) -> Iterator[Text]:
    found = read_records(source)
    if found is None:
        yield from_text(read_text(source), dialogue)
        return
    chance = random.Random(f"{seed}/{source}")
    for where, record in found:
        text = from_record(record, dialogue, chance, where)
        if text.pieces or text.ends:
            yield text


def _tokens(texts: Iterable[Text], tokenizer: Any) -> Iterator[tuple[list[int], list[bool]]]:
    """(ids, counts) of one text after another."""
    for batch in _batches(texts):
        pieces = [piece for text in batch for piece, _ in text.pieces]
        encoded = iter(tokenizer(pieces, add_special_tokens=False, verbose=False).input_ids if pieces else [])
        for text in batch:
            ids: list[int] = []
            predicted: list[bool] = []
            for _, is_predicted in text.pieces:
                new = next(encoded)
                ids += new
                predicted += [is_predicted] * len(new)
            if text.ends:
                ids.append(_end(tokenizer))
                predicted.append(True)
            # a token counts when the one after it is to be predicted
            yield ids, [*predicted[1:], False][: len(ids)]


def _batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    batch: list[Text] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += sum(len(piece) for piece, _ in text.pieces)
        if characters >= CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _end(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise BaseModelError("the tokenizer of the base has no end-of-text token, which separates texts")
    return tokenizer.eos_token_id
