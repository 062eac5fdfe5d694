"""Divides the gap between the window alone and full attention by kinds of tokens, and measures which oracles close it.

    python benchmarks/loss.py where BOOKS.jsonl[.xz] [--base smollm2-135m] [--tokens 4096] [--lossless 512] [--books 8]

1. By the token to be predicted: is it common, in the window, only further back, further back after the same token?
2. By oracle: attention in which the evicted tokens are replaced. "mass": by their exact weight with a value of zero;
   "mean": by that weight and the plain mean of their values; "smooth": by that weight and their values averaged at
   twice the temperature; "top K": by the K keys with the highest scores, for each query and head.

Attention is plain and holds all scores in memory, so texts must be short and models small.
"""

from __future__ import annotations

import argparse
from collections import Counter
from itertools import pairwise
from typing import Any

from common import SINKS, records, write

NAME = "where"
TINY = "{books} --base {base} --tokens 256 --lossless 80 --books 2 --oracles mass mean smooth"
COMMON = 300  # most frequent tokens of the books
CLASSES = ("common", "in the window", "further back", "further back, after the same token", "new")
ORACLES = ("mass", "mean", "smooth", "top 4", "top 16", "top 64")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("texts")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--lossless", type=int, default=512)
    parser.add_argument("--books", type=int, default=8)
    parser.add_argument("--oracles", nargs="*", default=ORACLES)


def run(options: argparse.Namespace) -> None:
    import torch

    import ahn
    from ahn.bases import load_base
    from losses._positions import position_losses

    tokenizer = ahn.load_tokenizer(options.base)
    texts = [tokenizer(record["text"][: 8 * options.tokens]).input_ids for record in records(options.texts)]
    books = [ids[: options.tokens + 1] for ids in texts if len(ids) > options.tokens][: options.books]
    common = {token for token, _ in Counter(token for ids in texts for token in ids).most_common(COMMON)}
    model = load_base(options.base)
    attention = Oracle(model, options.lossless - SINKS)

    def losses(kind: str) -> Any:
        """Losses over the second half of each book, [books, tokens / 2]."""
        attention.kind = kind
        found = [position_losses(model, torch.tensor([ids]), whole=True)[0] for ids in books]
        return torch.stack(found)[:, options.tokens // 2 :]

    full, window = losses("full"), losses("window")
    gap = (window - full).mean().item()
    half = options.tokens // 2
    print(f"{len(books)} books; full attention {full.mean():.4f}, window of {options.lossless} {window.mean():.4f}")
    kinds = [[kind_of(ids, t, options.lossless, common) for t in range(half, options.tokens)] for ids in books]
    classes = []
    print(f"\n{'token to be predicted':<38}{'tokens':>8}{'full':>8}{'window':>8}{'of the gap':>12}")
    for name in CLASSES:
        here = torch.tensor([[kind == name for kind in row] for row in kinds])
        share = here.float().mean().item()
        of_gap = (window - full)[here].sum().item() / (gap * here.numel())
        means = [values[here].mean().item() if share else 0.0 for values in (full, window)]
        classes.append({"class": name, "tokens": share, "full": means[0], "window": means[1], "of_gap": of_gap})
        print(f"{name:<38}{share:>8.1%}{means[0]:>8.3f}{means[1]:>8.3f}{of_gap:>12.1%}")
    oracles = []
    print(f"\n{'oracle':<38}{'loss':>8}{'closed':>8}")
    for name in options.oracles:
        loss = losses(name).mean().item()
        closed = (window.mean().item() - loss) / gap
        oracles.append({"oracle": name, "loss": loss, "closed": closed})
        print(f"{name:<38}{loss:>8.4f}{closed:>8.0%}", flush=True)
    about = {"base": options.base, "tokens": options.tokens, "lossless": options.lossless, "books": len(books)}
    means = {"full": full.mean().item(), "window": window.mean().item()}
    print(write(options.name, **about, **means, classes=classes, oracles=oracles))


def kind_of(ids: list[int], t: int, lossless: int, common: set[int]) -> str:
    """The class of token t + 1, predicted at position t."""
    oldest = t - (lossless - SINKS) + 1
    wanted, last = ids[t + 1], ids[t]
    if wanted in common:
        return "common"
    if wanted in ids[oldest : t + 1] or wanted in ids[:SINKS]:
        return "in the window"
    far = ids[SINKS:oldest]
    if (last, wanted) in pairwise(far):
        return "further back, after the same token"
    return "further back" if wanted in far else "new"


class Oracle:
    """The attention of a plain model, replaced by one that knows all scores; `kind` is set from outside."""

    def __init__(self, model: Any, window: int) -> None:
        from transformers.modeling_utils import AttentionInterface

        self.window, self.kind = window, "full"
        AttentionInterface.register("oracle", self)
        model.config._attn_implementation = "oracle"

    def __call__(self, module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
        import torch

        groups = q.shape[1] // k.shape[1]
        heads = [self._head(q[0, h], k[0, h // groups], v[0, h // groups], scaling) for h in range(q.shape[1])]
        return torch.stack(heads, 1)[None].to(q.dtype), None

    def _head(self, q: Any, k: Any, v: Any, scaling: float) -> Any:
        import torch

        scores, v = (q @ k.T).float() * scaling, v.float()
        at = torch.arange(len(q), device=q.device)
        causal = at <= at[:, None]
        near = causal & ((at > at[:, None] - self.window) | (at < SINKS))
        far = causal & ~near
        low = torch.finfo(scores.dtype).min

        def attend(seen: Any, scores: Any = scores) -> Any:
            return scores.masked_fill(~seen, low).softmax(-1) @ v

        if self.kind == "full":
            return attend(causal)
        if self.kind == "window":
            return attend(near)
        beyond = scores.masked_fill(~far, low)
        if self.kind.startswith("top"):
            least = beyond.topk(int(self.kind.split()[1]), -1).values[:, -1:]
            return attend(near | (far & (scores >= least)))
        weight = scores.masked_fill(~near, low).logsumexp(-1) - beyond.logsumexp(-1)
        weight = torch.where(far.any(-1), (-weight).sigmoid(), 0.0)[:, None]
        content = {
            "mass": lambda: torch.zeros_like(v),
            "mean": lambda: far.float() @ v / far.float().sum(-1, keepdim=True).clamp(min=1),
            "smooth": lambda: attend(far, scores / 2),
        }[self.kind]()
        return (1 - weight) * attend(near) + weight * content
