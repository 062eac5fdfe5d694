"""Can facts be recalled? Questions on articles (SQuAD) whose answer has left the window, or is still in it.

    python benchmarks/qa.py squad-dev.jsonl[.xz] [--adapter FOLDER ...] [--base smollm2-135m] [--tokens 8192 16384]

Articles are joined to contexts of `--tokens` tokens, question and answer included. Two groups of questions are asked
about each, the same ones whatever the memory: "behind", whose paragraph has left the largest window when the question
comes and whose answers do not occur in that window, and "within", whose paragraph is in the smallest window until the
answer ends. For full attention (where the base has the positions), sinks and window, and each adapter: word F1 and
exact match (%) of a greedy answer, the loss (nats a token) of the first right answer, and how much lower that loss is
than that of sinks and window, with the standard error of the difference by question.

A context is read once and every question asked from a copy of what is remembered of it; contexts are rows of a batch
while they are read, questions while they are answered.
"""

from __future__ import annotations

import argparse
import random
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import ahn
from ahn.compat import PAST
from ahn.dialogue import Dialogue
from ahn.engine.generate import end_tokens
from ahn.eval.metrics import exact_match, f1
from ahn.eval.squad import Context, Question, contexts
from common import now, put_on, records, set_lossless, write

SINKS = 64
ROOM = 160  # tokens kept free behind a context for a question and its answer
INSTRUCTION = "Give a short answer (1 to 5 words)."


@dataclass
class Asked:
    """A question in `group`, of the `row`-th context, as token ids: up to where the answer begins, and the answer."""

    group: str
    row: int
    question: Question
    prompt: Tensor
    answer: Tensor


def choose(
    texts: list[Context],
    tokenizer: Any,
    lossless: list[int],
    answer_tokens: int,
    each: int,
    seed: int,
    instruction: str = INSTRUCTION,
) -> list[Asked]:
    """At most `each` questions of either group on each context, each followed by `instruction`."""
    dialogue = Dialogue(tokenizer)
    chance = random.Random(seed)
    chosen = []
    for row, text in enumerate(texts):
        largest = max(lossless) - SINKS
        kept = tokenizer.decode(text.ids[-largest:]).lower()
        behind = [q for q in text.behind(SINKS, largest) if not any(a.lower() in kept for a in q.answers)]
        for group, pool in (("behind", behind), ("within", text.within(min(lossless) - SINKS, ROOM))):
            taken = 0
            for question in chance.sample(pool, len(pool)):
                prompt = dialogue.question(f"{question.text} {instruction}")[0]
                answer = torch.tensor(tokenizer(question.answers[0], add_special_tokens=False).input_ids)
                if taken < each and len(prompt) + max(len(answer), answer_tokens) <= ROOM:
                    chosen.append(Asked(group, row, question, prompt, answer))
                    taken += 1
    return chosen


def padded(rows: list[Tensor], past: int, device: Any) -> tuple[Tensor, Tensor]:
    """Ids [B, T] with padding in front, and their attention mask [B, past + T]."""
    width = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    free = torch.tensor([width - len(row) for row in rows])[:, None]
    real = torch.cat([torch.ones(len(rows), past, dtype=torch.long), (torch.arange(width) >= free).long()], 1)
    return ids.to(device), real.to(device)


def answer_losses(model: Any, cache: ahn.AHNCache, asked: list[Asked]) -> list[float]:
    """Mean loss (nats) of the tokens of each right answer."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    ids, real = padded([torch.cat([one.prompt, one.answer]) for one in asked], cache.tokens_seen, model.device)
    longest = max(len(one.answer) for one in asked)
    hidden = decoder(ids, attention_mask=real, **{PAST: cache}).last_hidden_state[:, -longest - 1 : -1]
    targets = ids[:, -longest:].clone()
    lengths = torch.tensor([len(one.answer) for one in asked], device=ids.device)
    targets[torch.arange(longest, device=ids.device) < longest - lengths[:, None]] = -100
    losses = cross_entropy(head(hidden).float().transpose(1, 2), targets, reduction="none")
    return (losses.sum(1) / lengths).tolist()


def greedy(model: Any, cache: ahn.AHNCache, asked: list[Asked], limit: int, ends: list[int]) -> list[list[int]]:
    """The likeliest answers, without the token that ends them."""
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    past = cache.tokens_seen
    ids, real = padded([one.prompt for one in asked], past, model.device)
    places = torch.tensor([[past + len(one.prompt)] for one in asked], device=ids.device)
    stops = torch.tensor(ends, device=ids.device)
    hidden = decoder(ids, attention_mask=real, **{PAST: cache}).last_hidden_state
    tokens: list[Tensor] = []
    while True:
        tokens.append(head(hidden[:, -1]).argmax(-1, keepdim=True))
        # whether all are done is asked every eighth token only: the answer makes a GPU wait
        if len(tokens) == limit or (
            len(tokens) % 8 == 0 and torch.isin(torch.cat(tokens, 1), stops).any(1).all().item()
        ):
            break
        hidden = decoder(tokens[-1], position_ids=places + len(tokens) - 1, **{PAST: cache}).last_hidden_state
    rows = torch.cat(tokens, 1).tolist()
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


@torch.inference_mode()
def ask(
    model: Any, tokenizer: Any, texts: list[Context], asked: list[Asked], limit: int, rows: int
) -> list[dict[str, Any]]:
    """F1, exact match, loss and the answer itself for each question."""
    ends = sorted(end_tokens(model, tokenizer))
    results: list[dict[str, Any]] = []
    for low in range(0, len(texts), rows):
        cache = ahn.read(model, torch.stack([text.ids for text in texts[low : low + rows]]))
        here = [one for one in asked if low <= one.row < low + rows]
        for first in range(0, len(here), rows):
            batch = here[first : first + rows]
            memories = cache.fork()
            memories.batch_select_indices(torch.tensor([one.row - low for one in batch]))
            losses = answer_losses(model, memories.fork(), batch)
            for one, loss, ids in zip(batch, losses, greedy(model, memories, batch, limit, ends), strict=True):
                said = tokenizer.decode(ids, skip_special_tokens=True).strip()
                right = one.question.answers
                results.append({"f1": f1(said, right), "em": exact_match(said, right), "loss": loss, "said": said})
    return results


def summary(results: list[dict[str, Any]], window: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Means over questions; `window`: results of sinks and window for the same questions."""
    row: dict[str, Any] = {"questions": len(results)}
    for key, scale in (("f1", 100), ("em", 100), ("loss", 1)):
        values = [scale * result[key] for result in results]
        row[key], row[f"{key}_se"] = round(statistics.fmean(values), 4), round(standard_error(values), 4)
    if window is not None:
        gains = [before["loss"] - after["loss"] for before, after in zip(window, results, strict=True)]
        row["gain"], row["gain_se"] = round(statistics.fmean(gains), 4), round(standard_error(gains), 4)
    return row


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def line(row: dict[str, Any]) -> str:
    gain = f"{row['gain']:>8.3f} ±{row['gain_se']:.3f}" if "gain" in row else " " * 15
    return f"{row['f1']:>8.1f}{row['em']:>7.1f}{row['loss']:>8.3f}{gain}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("articles")
    parser.add_argument("--adapter", nargs="*", default=ahn.zoo.names())
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384])
    parser.add_argument("--lossless", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--contexts", type=int, default=16)
    parser.add_argument("--questions", type=int, default=16, help="of each group on each context, at most")
    parser.add_argument("--answer", type=int, default=24, help="tokens, at most")
    parser.add_argument("--instruction", default=INSTRUCTION, help="behind each question")
    parser.add_argument("--rows", type=int, default=64, help="of a batch, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=0, help="answers to print for each memory")
    parser.add_argument("--name", default="qa")
    options = parser.parse_args()

    tokenizer = ahn.load_tokenizer(options.base)
    articles = records(options.articles)
    model = ahn.from_pretrained(options.base, "none", window=16, sinks=0)
    positions = model.config.max_position_embeddings
    rows: list[dict[str, Any]] = []
    for tokens in options.tokens:
        lossless = [size for size in options.lossless if size < tokens - ROOM]
        if not lossless:
            parser.error(f"--lossless {options.lossless}: none is below {tokens} - {ROOM} tokens")
        texts = contexts(articles, tokenizer, tokens - ROOM, options.contexts, options.seed)
        asked = choose(texts, tokenizer, lossless, options.answer, options.questions, options.seed, options.instruction)
        groups = {group: [i for i, one in enumerate(asked) if one.group == group] for group in ("behind", "within")}
        groups = {group: indices for group, indices in groups.items() if indices}
        if not groups:
            parser.error(
                f"--tokens {tokens}: no question lies there behind or within a window of --lossless {lossless}"
            )
        counts = ", ".join(f"{len(indices)} questions {group}" for group, indices in groups.items())
        print(f"\n{tokens:,} tokens, {len(texts)} contexts, {counts} the window")
        print(f"{'':<44}{'lossless':>9}" + "".join(f"{group:>8}{'':>30}" for group in groups) + f"{'s':>7}")
        print(f"{'':<53}" + f"{'F1':>8}{'EM':>7}{'loss':>8}{'gain':>8}{'':>7}" * len(groups))
        window: dict[int, list[dict[str, Any]]] = {}
        for memory in ["full attention", "sinks and window", *options.adapter]:
            if memory == "full attention" and tokens > positions:
                continue
            adapter = memory in options.adapter
            name = put_on(model, memory if adapter else None)
            name = memory if memory == "full attention" else name
            for size in [tokens] if memory == "full attention" else lossless:
                set_lossless(model, size, SINKS)  # a window that holds everything is full attention
                start = now(model.device)
                results = ask(model, tokenizer, texts, asked, options.answer, options.rows)
                seconds = now(model.device) - start
                if memory == "sinks and window":
                    window[size] = results
                cells = []
                for group, indices in groups.items():
                    here = [results[i] for i in indices]
                    before = [window[size][i] for i in indices] if adapter else None
                    row = summary(here, before)
                    rows.append({"tokens": tokens, "memory": memory, "lossless": size, "group": group, **row})
                    cells.append(line(row))
                print(f"{name:<44}{size:>9,}" + "".join(cells) + f"{seconds:>7.0f}", flush=True)
                for one, result in list(zip(asked, results, strict=True))[: options.show]:
                    print(f"    {one.question.text} {one.question.answers[0]!r}: {result['said']!r}")
    print(
        write(
            options.name,
            base=options.base,
            sinks=SINKS,
            seed=options.seed,
            contexts=options.contexts,
            answer_tokens=options.answer,
            instruction=options.instruction,
            rows=rows,
        )
    )


if __name__ == "__main__":
    main()
