"""Tables of the goals, met and missed: results.md."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from pages.losses import SMALL
from pages.recall import ASKED
from pages.speed import NARROW, STORE, WIDE, newest, shape
from pages.tables import Row, at_least, at_most, markdown, one, recalled, result, rows, table, wrapped

SET_GOALS = {"SQuAD": (1.15, 5), "FairytaleQA": (1.15, 0), "MuSiQue": (1, 0), "HotpotQA": (1, 0)}


@table
def goals_recall() -> str:
    """The goals of recall. They count questions whose evidence is behind the window, where there are any."""
    name = ASKED
    found = {(row["task"], row["policy"]): row for row in reversed(rows(name)) if row["length"] == 16_384}

    def score(task: str, policy: str, group: str = "behind") -> float:
        row = found[f"qa/{task.lower()}", policy]
        return float((row.get(group) or row)["score"])

    body = []
    for task, (times, points) in SET_GOALS.items():
        recall, full, rag = (score(task, policy) for policy in ("recall", "full", "rag"))
        body.append(at_least(f"{task}: F1, times that of full attention", times, recall / full, "{:.2f}", "H200"))
        body.append(at_least(f"{task}: F1, points above `rag`", points, recall - rag, "{:.1f}", "H200"))
    squad, same = found["qa/squad", "recall"], result(name)["qmsum_questions_that_recall_answered"]
    same_questions = result(name)["the_same_questions_in_16384_tokens"]
    longer = {length: same_questions[f"{length}"]["score"] for length in (16_384, 131_072, 1_048_576)}
    within = {
        task: score(task, "recall", "within") - score(task, "ahn", "within") for task in SET_GOALS if task[0] in "SF"
    }
    by_policy = {(row["task"], row["policy"]): row["score"] for row in rows("ruler-qwen2.5-coder-1.5b")}
    needles = {
        task: score - by_policy[task, "ahn"]
        for (task, policy), score in by_policy.items()
        if policy == "recall" and "/niah_" in task
    }
    body += [
        at_least("SQuAD: evidence among 512 tokens, %", 93, squad["found"]["512"], "{:.1f}", "H200"),
        *(
            at_least(f"{task}: evidence of the third with fewest shared words, %", 80, share, "{:.1f}", "H200")
            for task in SET_GOALS
            for share in [found[f"qa/{task.lower()}", "recall"]["lowest_third"]["found"]]
        ),
        *(
            at_least(f"SQuAD in {length:,} tokens, of F1 in 16,384", 0.9, f1 / longer[16_384], "{:.3f}", "H200")
            for length, f1 in longer.items()
            if length > 16_384
        ),
        *(
            at_least(f"{task} within the window: points above the memory", -1, points, "{:.1f}", "H200")
            for task, points in within.items()
        ),
        at_least(
            "QMSum: points above the memory without recall", -1, same["recall"] - same["ahn"], "{:.1f}", "H200"
        ),
        at_least("needles: points above the store", 0, mean(needles.values()), "{:.1f}", "H200"),
    ]  # fmt: skip
    small, large = (result(f"find-cpu-{part}")["finding"]["fused"] for part in ("finding", "1.5b-shape"))
    gpu, reading = result("find-h200"), result("find-h200-reading")["reading"]
    ratio = result("find-cpu-reading")["reading"]["keys_cpu_s_ratio"]
    bytes_of = gpu["asking"]["keys"]["plain_bytes"] / gpu["asking"]["none"]["plain_bytes"]
    body += [
        at_most("passages in a million tokens, s", 0.05, gpu["finding"]["fused"]["later_s"], "{:.2f}", "H200"),
        at_most("passages in a million tokens, SmolLM2, s", 0.25, small["later_cpu_s"], "{:.2f}", "2 CPU cores"),
        at_most(
            "passages in a million tokens, 9 layers of the 1.5B's shape, s",
            0.25,
            large["later_cpu_s"],
            "{:.2f}",
            "2 CPU cores",
        ),
        at_most("bytes while asking without recall, of those without an archive", 1, bytes_of, "{:.2f}", "H200"),
        at_most("reading with keys kept, times as long", 1.03, reading["keys_ratio"], "{:.2f}", "H200"),
        at_most("reading with keys kept, SmolLM2, times as long", 1.05, ratio, "{:.2f}", "2 CPU cores"),
    ]
    files = ", ".join(
        f"`{part}.json`"
        for part in (
            name, "ruler-qwen2.5-coder-1.5b", "find-h200", "find-h200-reading", "find-cpu-finding",
            "find-cpu-1.5b-shape", "find-cpu-reading",
        )
    )  # fmt: skip
    best = score("SQuAD", "rag-true") - score("SQuAD", "rag")
    fit = " and ".join(f"{found[f'qa/{task}', 'recall']['n']}" for task in ("musique", "hotpotqa"))
    bare = {task: score(task, "recall", "within") - score(task, "window", "within") for task in within}
    counts = ", ".join(f"{found[f'qa/{task.lower()}', 'recall'].get('behind', {}).get('n')}" for task in SET_GOALS)
    about = (
        f"Qwen2.5-Coder-1.5B with its adapter. F1 of {counts} questions whose evidence is behind the window, where the "
        f"goals ask for at least 200 (MuSiQue and HotpotQA have {fit} that fit). The memory is window, store and "
        f"cell, without recall. Within the window are {found['qa/squad', 'recall']['within']['n']} questions of each "
        f"set; there F1 with recall is {bare['SQuAD']:+.1f} points from that of the bare window on SQuAD and "
        f"{bare['FairytaleQA']:+.1f} on FairytaleQA. QMSum has {same['n']} questions, the longer texts "
        f"{same_questions['16384']['n']}, each of {len(needles)} kinds of needles 25. Seconds on a CPU are of all "
        "threads, because other work used the cores; a CPU read 512 tokens. With the true passage always among those "
        f"that are read, the same model and prompt are {best:.1f} points above `rag` on SQuAD, so 5 points cannot be "
        "reached this way. "
        f"({files})"
    )
    return f"{markdown(['goal', 'device', 'limit', 'measured', ''], body)}\n\n{wrapped(about)}"


FOUND = {"single_1": 0.9, "single_2": 0.9, "single_3": 0.9, "multikey_1": 0.6, "multivalue": 0.6, "multiquery": 0.6}


@table
def goals_memory() -> str:
    files = "gap-smollm2-135m", "gap-store-qwen2.5-coder-0.5b", "gap-store-smollm2-135m-deltanet"
    small, books, stored = files
    default = "qwen2.5-coder-0.5b-gated_deltanet"
    found = recalled(result("recall-qwen2.5-coder-0.5b-default"))
    asked = {(row["memory"], row["group"]): row["f1"] for row in rows("qa-qwen2.5-coder-0.5b")}
    least, most = asked["sinks and window", "behind"], asked["full attention", "behind"]

    def closed(cell: str, size: int) -> float:
        return float(one(small, memory=f"smollm2-135m-{cell}", lossless=size)["closed"])

    def of_full(task: str) -> float:
        return float(found[f"ruler/niah_{task}", "ahn", 4]["score"] / found[f"ruler/niah_{task}", "full", 0]["score"])

    def extra(name: str, memory: str) -> float:
        with_store, without = (one(name, memory=m, lossless=2048)["loss"] for m in (memory, f"{memory}@none"))
        return float(with_store - without)

    share = (asked[default, "behind"] - least) / (most - least)
    body = []
    for cell, size, limit in (
        ("deltanet", 512, 0.6),
        ("deltanet", 1024, 0.6),
        (SMALL[1], 512, 0.45),
        (SMALL[2], 512, 0.45),
    ):
        body.append(at_least(f"gap closed, {cell}, {size:,} lossless", limit, closed(cell, size), "{:.0%}", "SmolLM2"))
    body.append(at_least("gap closed", 0.6, one(books, memory=default)["closed"], "{:.0%}", "Qwen 0.5B"))
    for task, limit in FOUND.items():
        body.append(at_least(f"found, of full attention's: {task}", limit, of_full(task), "{:.0%}", "Qwen 0.5B"))
    body += [
        at_least("SQuAD behind the window: gap in F1 closed by the store", 0.6, share, "{:.0%}", "Qwen 0.5B"),
        at_most("loss on books, with the store less without", 0, extra(books, default), "{:.3f}", "Qwen 0.5B"),
        at_most(
            "loss on books, with three quarters stored less without",
            0,
            extra(stored, "smollm2-135m-deltanet"),
            "{:.3f}",
            "SmolLM2",
        ),
    ]
    about = "Files: the tables below and in store.md name them."
    return f"{markdown(['goal', 'base', 'limit', 'measured', ''], body)}\n\n{about}"


def ratio(files: Sequence[str], what: str, key: str, **wanted: Any) -> float:
    """The time of the newest row with a store over that of the newest row without one, of the same commit if there is
    one."""
    stored = newest(files, cell=STORE, what=what, **wanted)
    assert stored
    plain = newest(files, cell="gated_deltanet", what=what, commit=stored.get("commit"), **wanted)
    plain = plain or newest(files, cell="gated_deltanet", what=what, **wanted)
    assert plain
    return float(stored[key] / plain[key])


@table
def goals_speed() -> str:
    h100, h200 = WIDE["H100"], WIDE["H200"]
    k, three, half = 131072, {"shape": "qwen2.5-3b", "batch": 1}, {"shape": "qwen2.5-coder-0.5b", "batch": 1}

    def of(files: Sequence[str], what: str, key: str, length: int = k, cell: str = "gated_deltanet") -> float:
        found = newest(files, what=what, length=length, cell=cell, **three)
        assert found, f"no {what} of {length:,} tokens in {', '.join(files)}"
        return float(found[key])

    def times(files: Sequence[str], what: str, key: str, of_shape: Row, length: int = k) -> float:
        return ratio(files, what, key, length=length, **of_shape)

    def large(files: Sequence[str], cell: str) -> float:
        return float((newest(files, **shape("qwen2.5-14b", cell, "read")) or {})["first_s"])

    million = 1048576
    slower = of(h100, "read", "prefill_s", million) / of(h100, "read", "prefill_s") * k / million - 1
    peaks = abs(of(h100, "read", "peak_gib", million) / of(h100, "read", "peak_gib") - 1)
    faster = of(h200, "read", "prefill_s", cell="full") / of(h200, "read", "prefill_s")
    loaded = one("load-cpu-2threads", lossless=2048)["first_token_s"]
    smol, qwen = (result(f"train-{name}") for name in ("smollm2-135m-h100", "qwen2.5-coder-0.5b-deltanet"))
    body = [
        at_most("decode a token, ms", 3.3, of(h100, "decode", "decode_ms"), "{:.2f}", "H100"),
        at_least("decode a token, share of the floor", 0.75, of(h100, "decode", "of_floor"), "{:.0%}", "H100"),
        at_most("decode a token through `ahn.generate`, ms", 3.3, of(h100, "decode", "generate_ms"), "{:.2f}", "H100"),
        at_most("decode with a store, times as long", 1.1, times(h100, "decode", "decode_ms", three), "{:.3f}", "H100"),
        at_most(
            "decode with a store, 0.5B, times as long", 1.1, times(h200, "decode", "decode_ms", half), "{:.3f}", "H200"
        ),
        at_most("read 65,536 tokens, s", 1.5, of(h100, "read", "prefill_s", 65536), "{:.2f}", "H100"),
        at_most("read 131,072 tokens, s", 3.2, of(h100, "read", "prefill_s"), "{:.2f}", "H100"),
        at_least("read 131,072 tokens, times as fast as full attention", 1.9, faster, "{:.2f}", "H200"),
        at_most("time a token at 1,048,576, above that at 131,072", 0.05, slower, "{:.1%}", "H100"),
        at_most("difference of the peaks at these lengths", 0.01, peaks, "{:.1%}", "H100"),
        at_most("peak at 1,048,576, GiB", 9.5, of(h100, "read", "peak_gib", million), "{:.2f}", "H100"),
        at_most("cache, above the cost model", 0.02, of(h100, "read", "cache_over_model"), "{:.0%}", "H100"),
        at_most("read with a store, times as long", 1.3, times(h200, "read", "prefill_s", three), "{:.2f}", "H200"),
        at_most(
            "read with a store, 0.5B, times as long", 1.3, times(h200, "read", "prefill_s", half), "{:.2f}", "H200"
        ),
        at_most(
            "read 16,384 tokens with a store, 0.5B, times as long",
            1.3,
            times(h200, "read", "prefill_s", half, 16384),
            "{:.2f}",
            "H200",
        ),
        at_most(
            "read 16,384 tokens with a store, 0.5B, 2,048 lossless, times as long",
            1.3,
            times(NARROW["H200"], "read", "prefill_s", half, 16384),
            "{:.2f}",
            "H200",
        ),
        at_most("compile before the first 65,536 tokens, s", 60, of(h100, "read", "first_s", 65536), "{:.0f}", "H100"),
        at_most("compile before the first 65,536 tokens, s", 60, of(h200, "read", "first_s", 65536), "{:.0f}", "H200"),
        at_most("compile with a store, s", 60, of(h100, "read", "first_s", cell=STORE), "{:.0f}", "H100"),
        at_most("compile with a store, s", 60, of(h200, "read", "first_s", cell=STORE), "{:.0f}", "H200"),
        at_most("compile, 14B, deltanet, s", 60, large(h100, "deltanet"), "{:.0f}", "H100"),
        at_most("compile, 14B, mamba2, s", 60, large(h200, "mamba2"), "{:.0f}", "H200"),
        at_most(
            "a file of a million tokens to the first token, s",
            0.5,
            of(h100, "load", "first_token_s", million),
            "{:.3f}",
            "H100",
        ),
        at_most(
            "a file of a million tokens to the first token, s",
            0.5,
            of(h200, "load", "first_token_s", million),
            "{:.3f}",
            "H200",
        ),
        at_most(
            "a file of a million tokens to the first token, SmolLM2, 2,048 lossless, s", 2, loaded, "{:.2f}", "CPU"
        ),
        at_least("train SmolLM2, deltanet, tokens/s", 250000, smol["tokens_per_s"], "{:,.0f}", "H100"),
        at_least("train Qwen 0.5B, deltanet, tokens/s", 100000, qwen["tokens_per_s"], "{:,.0f}", "H200"),
        at_most(
            "train the 3B's shape on 24,576 tokens: peak, GiB",
            70,
            result("train-qwen2.5-3b")["peak_gib"],
            "{:.1f}",
            "H100",
        ),
    ]
    about = (
        "Shape of Qwen2.5-3B, gated_deltanet, 32,768 lossless tokens, if nothing else is said. Each number is the "
        "newest row of its file; performance.md names the files. The goal of reading 1.7 times as fast as the "
        "authors' code is open, because that was not run beside ours; by the 5.43 s that it took on another H100 it is "
        f"{5.43 / of(h100, 'read', 'prefill_s'):.1f} times."
    )
    return f"{markdown(['goal', 'device', 'limit', 'measured', ''], body)}\n\n{wrapped(about)}"


@table
def store_cost() -> str:
    """The time that a store adds, in sentences."""
    three, half = ({"shape": name, "batch": 1, "length": 131072} for name in ("qwen2.5-3b", "qwen2.5-coder-0.5b"))
    h100, h200 = WIDE["H100"], WIDE["H200"]
    decode, read = ("decode", "decode_ms"), ("read", "prefill_s")
    return wrapped(
        f"On GPUs ([performance.md](performance.md)) decoding takes {ratio(h100, *decode, **three):.2f} times as long "
        "with a store on an H100 with the 3B's shape, and reading 131,072 tokens "
        f"{ratio(h200, *read, **three):.2f} times as long on an H200 with untrained gates. With Qwen2.5-Coder-0.5B's "
        f"shape, on an H200, it is {ratio(h200, *decode, **half):.2f} and {ratio(h200, *read, **half):.2f} times: its "
        "heads of 64 channels are attended at a lower rate than by cuDNN. [results.md](results.md#goals) has the goals."
    )
