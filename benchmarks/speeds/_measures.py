"""Single measurements of reading, decoding, loading and asking."""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
from pathlib import Path
from typing import Any

from ahn.compat import PAST
from common import now

QUESTION, ANSWER = 16, 128  # tokens


def copy_rate(device: Any, repeats: int = 20) -> float:
    """Bytes a second of a large copy, read and written."""
    import torch

    count = 2**30 if device.type == "cuda" else 2**24
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    start = now(device)
    for _ in range(repeats):
        target.copy_(source)
    return 2 * count * repeats / (now(device) - start)


def fill(model: Any, cell: str, batch: int, length: int) -> Any:
    """A cache as after `length` tokens, of random numbers."""
    import torch
    from transformers import DynamicCache

    import ahn
    from ahn.ops import eviction

    config, like = model.config, {"dtype": model.dtype, "device": model.device}
    kv_heads, size = config.num_key_value_heads, config.head_dim
    if cell == "full":
        cache = DynamicCache()
        for index in range(config.num_hidden_layers):
            kv = torch.randn(2, batch, kv_heads, length, size, **like)
            cache.update(kv[0], kv[1], index)
        return cache
    cache = ahn.AHNCache(model)
    token = torch.empty(batch, kv_heads, 1, size, **like)
    for attention, memory in zip(model.get_decoder().layers, cache.layers, strict=True):
        memory.reserve(length, token, attention.self_attn.ahn.state_shape)
        for name, tensor in memory.tensors.items():
            if name == "ranks":
                positions, priority = torch.arange(tensor.shape[-1]).to(tensor)[None], torch.randn(tensor.shape)
                tensor.copy_(eviction.rank(priority.to(tensor.device), positions, positions >= 0))
            else:
                tensor.normal_()
    cache.tokens_seen, cache._seen, cache._batch = length, [length], batch
    return cache


def decode(model: Any, cache: Any, batch: int, steps: int, device: Any) -> dict[str, float]:
    """Greedy decoding by calling the model token by token, without waiting for the device in between.

    Returns:
        milliseconds a step, the median over runs of `steps`; and the seconds of the first two steps, which build
        kernels and capture graphs.
    """
    import torch

    ids = torch.zeros(batch, 1, dtype=torch.long, device=device)

    def run(count: int) -> float:
        nonlocal ids
        start = now(device)
        for _ in range(count):
            ids = model(ids, **{PAST: cache}, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        return now(device) - start

    first = run(2)
    times = [run(steps) / steps for _ in range(5)]
    return {"decode_ms": 1000 * statistics.median(times), "first_s": first}


def generate(model: Any, cache: Any, steps: int) -> dict[str, float]:
    """Decoding through `ahn.generate`: milliseconds a token, and milliseconds of an answer of four tokens.

    The latter shows the time before decoding runs evenly: reading the question, and the setup of `generate`.
    """
    import torch

    import ahn

    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    seconds = []
    for count in (4, 4, 4 + steps):  # the first run also captures the graph
        start = now(model.device)
        ahn.generate(model, ids, cache, max_new_tokens=count, do_sample=False, pad_token_id=0)
        seconds.append(now(model.device) - start)
    return {"generate_ms": 1000 * (seconds[2] - seconds[1]) / steps, "answer_begins_ms": 1000 * seconds[1]}


def read(model: Any, cell: str, batch: int, length: int, repeats: int) -> tuple[dict[str, float], Any]:
    """Seconds (median) and peak of reading random tokens, and the cache."""
    import torch

    import ahn

    ids = torch.randint(model.config.vocab_size, (batch, length), device=model.device)
    times, cache = [], None
    for _ in range(repeats):
        del cache
        cache = None
        start = now(model.device)
        if cell == "full":
            cache = model(ids, logits_to_keep=1, use_cache=True)[PAST]
        else:
            cache = ahn.read(model, ids, ahn.AHNCache(model))
        times.append(now(model.device) - start)
    return {"prefill_s": statistics.median(times)}, cache


def load(model: Any, cache: Any, repeats: int = 3) -> dict[str, float]:
    """Seconds from the file of a memory to a cache, and to the first token of an answer to a question of 16 tokens
    (medians; `first_s` the first time, in which kernels are built and graphs captured)."""
    import torch

    import ahn

    question = torch.zeros(1, QUESTION, dtype=torch.long, device=model.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.ahn"
        start = now(model.device)
        cache.save(path)
        save = now(model.device) - start

        def run() -> tuple[float, float]:
            start = now(model.device)
            loaded = ahn.AHNCache.load(path, model)
            load = now(model.device) - start
            ahn.generate(model, question, loaded, max_new_tokens=1, do_sample=False, pad_token_id=0)
            return load, now(model.device) - start

        _, first = run()
        loads, tokens = zip(*(run() for _ in range(repeats)), strict=True)
        row = {"load_s": statistics.median(loads), "first_token_s": statistics.median(tokens), "first_s": first}
        return row | {"save_s": save, "file_mb": path.stat().st_size / 1e6}


def ask(model: Any, tokenizer: Any, ids: Any) -> dict[str, float]:
    """Seconds and tokens a second of `ahn read` and `ahn ask` with a text `ids` [1, T] and an answer of full length."""
    from transformers import TextStreamer

    import ahn

    device = model.device
    start = now(device)
    cache = ahn.read(model, ids, ahn.AHNCache(model))
    read = now(device) - start

    def answer(count: int) -> float:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        options = {"do_sample": False, "pad_token_id": tokenizer.eos_token_id, "eos_token_id": -1}
        start = now(device)
        with contextlib.redirect_stdout(io.StringIO()):
            ahn.generate(model, ids[:, :QUESTION], cache, max_new_tokens=count, streamer=streamer, **options)
        return now(device) - start

    first, seconds = answer(4), answer(ANSWER)
    row = {"prefill_s": read, "tokens_per_s": ids.shape[1] / read}
    return row | {"answer_tokens_per_s": ANSWER / seconds, "answer_s": seconds, "answer_first_s": first}
