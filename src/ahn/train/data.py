"""Texts and chats as rows of token ids of one length, with the tokens that count.

A source is one of
- `.txt`, `.md`: one text, in any encoding that `ahn.documents` knows;
- `.jsonl`: a record a line, in UTF-8;
- `.parquet`: a record a row;
- `hub:OWNER/NAME[/CONFIG][:SPLIT]`: a dataset of the hub (split: train), streamed; `hub:FOLDER[:SPLIT]`: one on disk.

`.txt`, `.md` and `.jsonl` may be xz-compressed (`.jsonl.xz`). The last two kinds need the `datasets` library
(`pip install 'ahn[train]'`). Records are told apart by their keys: `messages` (a chat: answers count, prompts do not;
a `document` beside it precedes the first prompt, and `answers` beside it answer the last), `text` (everything counts),
`context` + `qas` or `paragraphs` with `qas` (a document and questions on it: the answers count), and LongBench's
`context`, `input`, `answers`.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import lzma
import random
import reprlib
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from ahn.dialogue import Dialogue, from_json
from ahn.documents.encoding import binary, guess, marked, wide
from ahn.errors import AHNError, BaseModelError, ConfigError, DocumentError
from ahn.hub import check_dataset, expanded

QUESTIONS = 24  # of a document, at most, in one chat
CHARACTERS_AT_ONCE = 1 << 20  # go to the tokenizer together, which works on several texts at a time
WORTH_KEEPING_S = 1.0  # rows that took less time than this are made again rather than kept
VERSION = "3"  # of the kept rows; raise it when the same source gives other rows
HUB = "hub:"
EXPECTED = f"expected .txt, .md, .jsonl (or one of these with .xz), .parquet, or {HUB}OWNER/NAME[/CONFIG][:SPLIT]"

logger = logging.getLogger(__name__)


@dataclass
class Rows:
    """`ids` [rows, T] int32 and `counts` [rows, T] bool: whether the token that follows is to be predicted."""

    ids: Tensor
    counts: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, wanted: Tensor) -> Rows:
        """The rows for which `wanted` [rows] is true."""
        return Rows(self.ids[wanted], self.counts[wanted])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[row].long(), "counts": self.counts[row]}


class _Text(NamedTuple):
    """What becomes one stretch of tokens: pieces that are tokenized apart, with whether they are to be predicted."""

    pieces: list[tuple[str, bool]]
    ends: bool  # with the end-of-text token


def rows(
    sources: list[str],
    tokenizer: Any,
    length: int,
    limit: int | None = None,
    seed: int = 0,
    cache: Path | None = None,
) -> Rows:
    """Read sources and pack them.

    Args:
        sources: paths or hub datasets. tokenizer: of the base. length: T of a row.
        limit: tokens of each source, at most, rounded up to whole rows.
        cache: folder where rows that took long are kept; the same source, tokenizer and settings find them there.

    Raises:
        DocumentError: a source is missing, empty, not text, of no known shape, or has records that are not in UTF-8;
            nothing fills a row.
        BaseModelError: the tokenizer has no end-of-text token or no chat template, and the sources need it.
    """
    parts = []
    for source in sources:
        key = cache and _key(source, tokenizer, length, limit, seed)
        if cache and key:
            parts.append(_kept(cache / f"{key}.safetensors", source, tokenizer, length, limit, seed))
        else:
            parts.append(_pack(source, tokenizer, length, limit, seed))
    return Rows(torch.cat([part.ids for part in parts]), torch.cat([part.counts for part in parts]))


def check_there(sources: list[str]) -> None:
    """Before anything is loaded. Raises DocumentError: a file is missing."""
    for source in sources:
        if not source.startswith(HUB) and not Path(source).exists():
            raise DocumentError(f"{source}: no such file")


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


def _tokens(texts: Iterable[_Text], tokenizer: Any) -> Iterator[tuple[list[int], list[bool]]]:
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


def _batches(texts: Iterable[_Text]) -> Iterator[list[_Text]]:
    batch: list[_Text] = []
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


def _texts(source: str, dialogue: Dialogue, seed: int) -> Iterator[_Text]:
    suffix = Path(source.removesuffix(".xz")).suffix
    on_hub = source.startswith(HUB)
    if on_hub or suffix in (".jsonl", ".parquet"):
        chance = random.Random(f"{seed}/{source}")
        for where, record in _dataset(source) if on_hub or suffix == ".parquet" else _records(source):
            text = _text(record, dialogue, chance, where)
            if text.pieces or text.ends:
                yield text
    elif suffix in (".txt", ".md"):
        whole = _whole(source)
        if not whole.strip():
            raise DocumentError(f"{source}: empty")
        yield _plain(whole, dialogue)
    else:
        kind = "is a folder" if Path(source).is_dir() else f"unknown kind of file {suffix!r}"
        raise DocumentError(f"{source}: {kind}; {EXPECTED}")


def _records(source: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(source), 1):
        if line.strip():
            where = f"{source}, line {number}"
            try:
                record = from_json(line)
            except (ValueError, RecursionError) as error:
                raise DocumentError(f"{where}: not JSON: {error}") from error
            yield where, record


def _lines(source: str) -> Iterator[str]:
    with _opened(source) as file, io.TextIOWrapper(file, "utf-8-sig") as lines:
        try:
            yield from lines
        except UnicodeDecodeError as error:
            raise DocumentError(f"{source}: not UTF-8 text ({error.reason}): expected records in UTF-8") from error


def _whole(source: str) -> str:
    """A text in the encoding that it seems to be in."""
    with _opened(source) as file:
        content = file.read()
    encoding = marked(content) or wide(content)
    if not encoding and (reason := binary(content)):
        raise DocumentError(f"{source}: not text ({reason}); {EXPECTED}")
    text = content.decode(encoding or guess(content), "replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


@contextmanager
def _opened(source: str) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked."""
    path = Path(source)
    if path.is_dir():
        raise DocumentError(f"{source}: is a folder; {EXPECTED}")
    try:
        with lzma.open(path) if path.suffix == ".xz" else open(path, "rb") as file:
            yield cast(BinaryIO, file)
    except FileNotFoundError as error:
        raise DocumentError(f"{source}: no such file") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DocumentError(f"{source}: cannot be read: {error}") from error


def _dataset(source: str) -> Iterator[tuple[str, Any]]:
    """Records of a dataset on the hub, of one in a folder, or of a parquet file; only what is asked for is read."""
    try:
        import datasets
    except ImportError as error:
        raise DocumentError(f"{source}: needs the datasets library: pip install 'ahn[train]'") from error
    try:
        if not source.startswith(HUB):
            if not Path(source).is_file():
                raise DocumentError(f"{source}: no such file")
            found = datasets.load_dataset("parquet", data_files=source, split="train", streaming=True)
        else:
            path, config, split = _hub_parts(source)
            if not Path(path).is_dir():
                check_dataset(path)
            found = datasets.load_dataset(path, config, split=split, streaming=True)
        for number, record in enumerate(found, 1):
            # absent keys of a record come as None when other records have them
            yield f"{source}, record {number}", {key: value for key, value in record.items() if value is not None}
    except DocumentError:
        raise
    except Exception as error:  # the library's own, those of its readers, and those of the hub client's HTTP library
        reason = str(error).strip() or type(error).__name__
        raise DocumentError(f"{source}: cannot be loaded: {reason.splitlines()[0]}") from error


def _hub_parts(source: str) -> tuple[str, str | None, str]:
    """Folder or hub id, configuration, split."""
    name, _, split = source.removeprefix(HUB).partition(":")
    if expanded(name).is_dir():
        return str(expanded(name)), None, split or "train"
    parts = name.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise DocumentError(f"{source}: no such folder; {EXPECTED}")
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split or "train"


def _text(record: Any, dialogue: Dialogue, chance: random.Random, where: str) -> _Text:
    if not isinstance(record, dict):
        raise DocumentError(f"{where}: {type(record).__name__}: expected a record with keys")
    try:
        if "messages" in record:
            return _chat(_conversation(record), dialogue)
        if "text" in record:
            return _plain(_text_of(record, "text"), dialogue)
        if "paragraphs" in record or "qas" in record:
            parts = _list_of(dict, record, "paragraphs") if record.get("paragraphs") else [record]
            text = "\n\n".join(_text_of(part, "context") for part in parts)
            qas = [qa for part in parts for qa in _list_of(dict, part, "qas")]
            asked = [(_text_of(qa, "question"), answers[0]) for qa in qas if (answers := _list_of(str, qa, "answers"))]
            chance.shuffle(asked)
            return _chat(_questions(text, asked[:QUESTIONS]), dialogue)
        if "input" in record and "answers" in record:
            asked = [(_text_of(record, "input"), answer) for answer in _list_of(str, record, "answers")[:1]]
            return _chat(_questions(_text_of(record, "context"), asked), dialogue)
    except KeyError as error:
        raise DocumentError(f"{where}: no {error} where one is expected") from error
    except (AttributeError, IndexError, TypeError, ConfigError) as error:
        raise DocumentError(f"{where}: not of the shape that its keys promise: {error}") from error
    raise DocumentError(f"{where}: keys {', '.join(record)}: expected messages, text, qas, or input and answers")


def _conversation(record: dict[str, Any]) -> list[dict[str, str]]:
    said = _list_of(dict, record, "messages")
    messages = [{key: _text_of(message, key) for key in ("role", "content")} for message in said]
    if record.get("document") is not None and (document := _text_of(record, "document")):
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise TypeError("a document, and no user to ask about it")
        first["content"] = f"{document}\n\n{first['content']}"
    if record.get("answers") and messages and messages[-1]["role"] == "user":
        messages.append({"role": "assistant", "content": _list_of(str, record, "answers")[0]})
    return messages


def _text_of(record: dict[str, Any], key: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise TypeError(f"{key!r} is {reprlib.repr(value)}: expected text")
    return value


def _list_of(kind: type, record: dict[str, Any], key: str) -> list[Any]:
    value = record[key]
    if not (isinstance(value, list) and all(isinstance(item, kind) for item in value)):
        raise TypeError(f"{key!r} is {reprlib.repr(value)}: expected a list of {'texts' if kind is str else 'records'}")
    return value


def _questions(text: str, asked: list[tuple[str, str]]) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = []
    for question, answer in asked:
        content = question if messages else f"{text}\n\n{question}"
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


def _plain(text: str, dialogue: Dialogue) -> _Text:
    return _Text([(piece, True) for piece in dialogue.inert(text)], ends=True)


def _chat(messages: list[dict[str, str]], dialogue: Dialogue) -> _Text:
    """Only answers count, with the token that ends them. Each turn is rendered by the tokenizer's own template."""
    if not dialogue.tokenizer.chat_template:
        raise BaseModelError("the tokenizer of the base has no chat template: expected sources of plain text")
    pieces: list[tuple[str, bool]] = []
    done = [""]
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        ask, told = dialogue.render(messages[:i], ask=True), dialogue.render(messages[: i + 1])
        pieces += [(piece, False) for piece in _behind(done, ask)]
        pieces += [(piece, True) for piece in _behind(ask, told)]
        done = told
    return _Text(pieces, ends=False)


def _behind(start: list[str], whole: list[str]) -> list[str]:
    """The pieces of `whole` that come after those of `start`."""
    *before, last = start
    if whole[: len(before)] != before or not whole[len(before)].startswith(last):
        raise ConfigError("the chat template writes the beginning of a conversation anew as it goes on")
    return [whole[len(before)][len(last) :], *whole[len(start) :]]


def _kept(path: Path, source: str, tokenizer: Any, length: int, limit: int | None, seed: int) -> Rows:
    """Rows from the cache, or made and put there. Of several processes one makes them, the others wait for it."""
    from filelock import FileLock
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    from ahn.files import atomic

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock")).acquire()
    except OSError as error:
        logger.warning("rows of %s are not kept: %s", source, error)
        return _pack(source, tokenizer, length, limit, seed)
    with lock:
        if path.is_file():
            try:
                return Rows(**load_file(path))
            except (OSError, SafetensorError) as error:
                logger.warning("%s: damaged, made again: %s", path, error)
        began = time.monotonic()
        made = _pack(source, tokenizer, length, limit, seed)
        if time.monotonic() - began >= WORTH_KEEPING_S:
            try:
                with atomic(path) as temporary:
                    save_file({"ids": made.ids, "counts": made.counts}, temporary)
            except AHNError as error:
                logger.warning("rows of %s are not kept: %s", source, error)
    return made


def _key(source: str, tokenizer: Any, length: int, limit: int | None, seed: int) -> str | None:
    """Names everything the rows of a source depend on; None if that cannot be told."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = _state(source)
    if backend is None or state is None:
        return None
    said = [VERSION, source, state, backend.to_str(), tokenizer.chat_template, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps([*said, length, limit, seed]).encode()).hexdigest()[:24]


def _state(source: str) -> list[Any] | None:
    """What changes when the content of a source does: size and time of each file, or the commit on the hub."""
    path = Path(source)
    if source.startswith(HUB):
        name, _, _ = _hub_parts(source)
        path = Path(name)
        if not path.is_dir():
            try:
                from huggingface_hub import dataset_info

                return [dataset_info(name, timeout=5).sha]
            except Exception:  # offline, or no such dataset: loading it says so
                return None
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    try:
        return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    except OSError:
        return None
