"""Runs a batch of examples and makes their rows of the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ahn.eval import results
from ahn.eval.batches import read_apart
from ahn.eval.prompts import exact_tokens
from ahn.eval.work import Job

if TYPE_CHECKING:
    from torch import Tensor

    from ahn.eval.policies.base import Policy

BIN = 512  # tokens whose mean loss is one number in the results


def rows_of(policy: Policy, batch: Sequence[Job]) -> list[results.Row]:
    """A row for each job; all jobs are of one kind. A batch that does not fit into the device's memory is halved."""
    import torch

    try:
        return _rows(policy, batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    torch.cuda.empty_cache()
    half = len(batch) // 2
    return [row for part in (batch[:half], batch[half:]) for row in rows_of(policy, part)]


def _rows(policy: Policy, batch: Sequence[Job]) -> list[results.Row]:
    ids = [job.prompt.ids for job in batch]
    if batch[0].work.task.kind == "loss":
        return [_measured(job, losses) for job, losses in zip(batch, policy.losses(ids), strict=True)]
    if not read_apart(batch[0], policy.recalls):
        answers = policy.answers(ids, [job.example.max_new_tokens for job in batch])
        said: list[tuple[list[int], dict[str, Any]]] = [(answer, {}) for answer in answers]
    else:
        said = policy.asked([(job.prompt, job.example) for job in batch])
    return [
        _answered(policy, job, policy.tokenizer.decode(answer, skip_special_tokens=True)) | more
        for job, (answer, more) in zip(batch, said, strict=True)
    ]


def _row(job: Job) -> results.Row:
    return {"id": job.example.id, "prompt": job.prompt.digest, "prompt_tokens": len(job.prompt.ids)}


def _measured(job: Job, losses: Tensor) -> results.Row:
    by_position = [round(part.mean().item(), 6) for part in losses.split(BIN)]
    return _row(job) | {"score": round(losses.mean().item(), 6), "losses": by_position}


def _answered(policy: Policy, job: Job, prediction: str) -> results.Row:
    example, prompt = job.example, job.prompt
    row = _row(job) | {"prediction": prediction, "score": job.work.task.score(example, prediction)}
    row |= {"evidence": prompt.evidence, "depth": example.depth}
    if prompt.needs:  # a fact's first place may be a sink, its last one may be in the window
        row["needs"] = [[fact[0], fact[-1]] if len(fact) > 1 else [fact[0]] for fact in prompt.needs]
    if example.extra.get("evidence_cut"):
        row["evidence_cut"] = True
    if prompt.evidence is not None and policy.uses_window:
        exact = exact_tokens(prompt.evidence, len(prompt.ids), policy.kept.window, policy.kept.sinks)
        row |= {"inside": exact, "outside": prompt.evidence[1] - prompt.evidence[0] - exact}
    return row
