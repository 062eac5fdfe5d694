"""What an archive costs: finding passages in a long text, reading with it, and the accelerator's memory while asking.

    python benchmarks/speed.py find [--base FILE.gguf] [--data books.jsonl.xz] [--tokens 1048576]

Without `--base` the model has the shape of Qwen2.5-1.5B and random weights (`--layers` of them), and a tokenizer made
for the text. `--data` are JSON lines with "text"; without it sentences of the bundled book are taken at random.
Retrieval heads are two query heads of layer 8 whose keys take 128 bytes a token.

finding: seconds from a question to its passages (`ahn.recall.find`), of which `queries_s` take the part of the model
that asks. All but the first tokens have random keys. The first question of a process also cuts the text into passages
and makes an index.

reading: seconds with each kind of archive, and the median of the ratios to reading without one. The kinds take turns,
so that whatever else the machine does meets all of them.

asking: bytes of the accelerator, held and at most. They do not depend on the archive.
"""

from __future__ import annotations

import argparse
import gc
import random
import re
import statistics
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers

import ahn
from ahn.dialogue import Dialogue, plain
from ahn.engine.generate import generate
from ahn.memory.archive import KEY_BYTES, KINDS
from ahn.memory.head_keys import RetrievalHeads
from ahn.recall import as_text, find
from ahn.recall.passages import number_parts, sentence_ends
from ahn.recall.question import Question
from common import BOOK, SINKS, environment, now, records, write

NAME = None  # find-DEVICE
TINY = "--tokens 20000 --length 2000 --lossless 1024 --layers 2 --repeats 2"

FINDERS = ("bm25", "heads", "fused")
QUESTIONS = (
    "Who found the letter that was hidden in the old house?",
    "Why did the captain leave the island before the winter came?",
    "What did the old man say about the necklace of the queen?",
    "Where was the inspector when the train arrived in the morning?",
    "How many people were on the ship when the storm began?",
)
TEMPLATE = "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}<|assistant|>"


def text_of(data: str | None, tokens: int) -> str:
    """About `tokens` tokens of books, rather more."""
    wanted, found = 5 * tokens, ""
    for record in records(data) if data else []:
        found += record["text"]
        if len(found) > wanted:
            return found[:wanted]
    sentences, draw = re.findall(r"[^.!?]+[.!?]+\s*", BOOK.read_text()), random.Random(0)
    while len(found) < wanted:
        found += "".join(draw.sample(sentences, len(sentences)))
    return found[:wanted]


def tokenizer_for(text: str) -> Any:
    """Byte pairs of a text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    special = ["<|user|>", "<|assistant|>", "<|end|>"]
    made = ByteLevelBPETokenizer()
    made.train_from_iterator([text[:1_000_000]], vocab_size=16_384, special_tokens=special, show_progress=False)
    found = PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    found.chat_template = TEMPLATE
    return found


def model_for(options: argparse.Namespace, tokenizer: Any, device: torch.device) -> Any:
    """The base, or a random one, with sinks, window and retrieval heads."""
    if options.base:
        model = ahn.from_pretrained(
            options.base, "none", window=options.lossless - SINKS, sinks=SINKS, dtype=options.dtype, device=device
        )
    else:
        from transformers import AutoModelForCausalLM, Qwen2Config

        size = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12}
        if options.tiny:
            size = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
        vocabulary = len(tokenizer) if options.tiny else 151_936
        config = Qwen2Config(
            **size,
            num_key_value_heads=2,
            num_hidden_layers=options.layers,
            vocab_size=vocabulary,
            tie_word_embeddings=True,
            max_position_embeddings=32_768,
            eos_token_id=tokenizer.eos_token_id,
        )
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()
        ahn.augment(model, ahn.AHNConfig(None, options.lossless - SINKS, SINKS))
    model.ahn_retrieval = heads_of(model.config)
    return model


def heads_of(config: Any) -> RetrievalHeads:
    """Two query heads, or one of each key/value head that has room."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups, layer = config.num_attention_heads // config.num_key_value_heads, min(8, config.num_hidden_layers - 1)
    kept = min(max(1, KEY_BYTES // size), config.num_key_value_heads)
    queries = (0, 1) if kept == 1 else tuple(groups * head for head in range(kept))
    scales = torch.stack([torch.zeros(kept, size), torch.full((kept, size), 0.05)])
    return RetrievalHeads(tuple((layer, head) for head in queries), groups, {layer: scales})


def memory_of(model: Any, ids: torch.Tensor, kind: str, lossless: int) -> Any:
    """Has read a few windows of `ids` [T]; the archive says that it has read all of it."""
    count = min(2 * lossless, len(ids))
    cache = ahn.read(model, ids[None, :count], archive=kind)
    if cache.archive is not None:
        cache.archive.add(ids[count:])
    if kind == "keys":
        heads, draw = model.ahn_retrieval, torch.Generator().manual_seed(0)
        for layer in heads.layers:
            shape = (len(ids) - count, *heads.scales[layer].shape[1:])
            keys = torch.randint(-127, 128, shape, dtype=torch.int8, generator=draw)
            cache.archive.keys._layers[layer]._pieces.append((count, keys))
    return cache


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the clock, and of the CPU's threads together, which other work on the machine lengthens less."""
    start, busy = now(device), time.process_time()
    work()
    return now(device) - start, time.process_time() - busy


def finding(model: Any, tokenizer: Any, memory: Any) -> dict[str, Any]:
    """Seconds by finder: the first question, and the median of others."""
    rows: dict[str, Any] = {}
    for finder in FINDERS:
        memory.archive._made.clear()
        sentence_ends.cache_clear(), number_parts.cache_clear()
        taken = [
            timed(model.device, lambda: find(model, tokenizer, memory, asked, 512, finder=finder))  # noqa: B023
            for asked in (*QUESTIONS, *QUESTIONS[1:])
        ]
        later, busy = map(statistics.median, zip(*taken[1:], strict=True))
        rows[finder] = {"first_s": taken[0][0], "later_s": later, "first_cpu_s": taken[0][1], "later_cpu_s": busy}
    queries = [timed(model.device, lambda: Question(asked, model, tokenizer, memory).queries) for asked in QUESTIONS]  # noqa: B023
    seconds, busy = map(statistics.median, zip(*queries, strict=True))
    return rows | {"queries_s": seconds, "queries_cpu_s": busy}


def reading(model: Any, ids: torch.Tensor, repeats: int) -> dict[str, Any]:
    """Seconds (median) by kind of archive, and ratios to none."""
    taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for turn in range(repeats + 1):
        for kind in KINDS[turn % 3 :] + KINDS[: turn % 3]:
            one = timed(model.device, lambda: ahn.read(model, ids, archive=kind))  # noqa: B023
            if turn:  # kernels are built and buffers are made in the first
                taken[kind].append(one)
    found: dict[str, Any] = {"tokens": ids.shape[-1], "repeats": repeats}
    for index, unit in enumerate(("s", "cpu_s")):
        by_kind = {kind: [one[index] for one in taken[kind]] for kind in KINDS}
        found |= {f"{kind}_{unit}": statistics.median(seconds) for kind, seconds in by_kind.items()}
        for kind in KINDS[1:]:
            ratios = [ours / none for ours, none in zip(by_kind[kind], by_kind["none"], strict=True)]
            found[f"{kind}_{unit}_ratio"] = statistics.median(ratios)
            found[f"{kind}_{unit}_ratio_quartiles"] = statistics.quantiles(ratios, n=4)[::2]
    return found


def asking(model: Any, tokenizer: Any, ids: torch.Tensor, lossless: int) -> dict[str, Any]:
    """Bytes on the accelerator by kind of archive: of the cache, held in all, and at most while a question is answered
    without recall (`plain_bytes`) and with it (`recall_bytes`; under `none`: with the passages of each kind written
    into the question)."""
    if model.device.type != "cuda":
        return {"skipped": "no accelerator"}
    question = QUESTIONS[0]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    finders, written, rows = {"text": "bm25", "keys": "heads"}, {}, {}
    for kind in ("keys", "keys", "text", "none"):  # the first time kernels are built and graphs captured
        gc.collect()
        before = torch.cuda.memory_allocated()
        memory = memory_of(model, ids, kind, lossless)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        row = {"cache_bytes": memory.nbytes, "held_bytes": held}
        row["plain_bytes"] = peak(ahn.ask, model, tokenizer, memory, question, 0, **options)
        if kind == "none":
            prompts = {name: Dialogue.of(tokenizer).question(question, passages) for name, passages in written.items()}
            row["recall_bytes"] = {name: peak(answer, model, memory, ids, **options) for name, ids in prompts.items()}
        else:
            recall: dict[str, Any] = {"recall": 512, "finder": finders[kind]}
            written[kind] = as_text(find(model, tokenizer, memory, question, **recall))
            row["recall_bytes"] = peak(ahn.ask, model, tokenizer, memory, question, **recall, **options)
        rows[kind] = row
        del memory
    return rows


def answer(model: Any, memory: Any, prompt: torch.Tensor, **options: Any) -> None:
    generate(model, prompt, memory.fork(), pad_token_id=0, **options)


def peak(work: Callable[..., Any], *args: Any, **options: Any) -> int:
    """Bytes that the accelerator needs at most during a call, beyond those allocated before."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    work(*args, **options)
    return torch.cuda.max_memory_allocated() - start


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", help="name, folder or GGUF file (default: random weights)")
    parser.add_argument("--data", help="JSON lines, xz-compressed or not")
    parser.add_argument("--tokens", type=int, default=2**20, help="of the text in which passages are found")
    parser.add_argument("--length", type=int, help="tokens to read (default: 65,536 on CUDA, else 2,048)")
    parser.add_argument("--lossless", type=int, default=2048, help="sinks and window (%(default)s tokens)")
    parser.add_argument("--layers", type=int, default=28, help="of random weights (%(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="of reading (%(default)s)")
    parser.add_argument("--dtype", help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--parts", nargs="+", default=["finding", "reading", "asking"])


def run(options: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    options.dtype = options.dtype or ("bfloat16" if cuda else "float32")
    length = options.length or (65_536 if cuda else 2048)
    name = options.name or ("find-" + (environment()["device"].split()[-1].lower() if cuda else "cpu"))

    transformers.logging.set_verbosity_error()
    began = time.perf_counter()
    text = text_of(options.data, options.tokens)
    tokenizer = ahn.load_tokenizer(options.base) if options.base else tokenizer_for(text)
    pieces = plain(tokenizer, re.findall(r".{1,4000}", text, re.DOTALL)).input_ids  # in all threads of the tokenizer
    ids = torch.tensor(list(chain.from_iterable(pieces))[: options.tokens])
    model = model_for(options, tokenizer, device)
    print(f"{len(ids):,} tokens, {time.perf_counter() - began:.0f} s to prepare", flush=True)
    found: dict[str, Any] = {}
    with torch.no_grad():
        work: dict[str, Callable[[], dict[str, Any]]] = {
            "finding": lambda: finding(model, tokenizer, memory_of(model, ids, "keys", options.lossless)),
            "reading": lambda: reading(model, ids[None, :length], options.repeats),
            "asking": lambda: asking(model, tokenizer, ids, options.lossless),
        }
        for part in options.parts:
            found[part] = work[part]()
            print(part, found[part], flush=True)
    settings = {
        "base": Path(options.base).name if options.base else "random weights",
        "shape": {key: getattr(model.config, key) for key in ("num_hidden_layers", "hidden_size", "vocab_size")},
        "heads": model.ahn_retrieval.to_dict()["heads"],
        "bytes_per_token": model.ahn_retrieval.bytes_per_token,
        "data": Path(options.data).name if options.data else BOOK.name,
    }
    sizes = {key: getattr(options, key) for key in ("tokens", "lossless", "dtype")} | {"sinks": SINKS}
    print(write(name, **settings, **sizes, **found), f"{time.perf_counter() - began:.0f} s")
