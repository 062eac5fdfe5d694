"""Examples that are read together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ahn.eval.work import Job


def batches(jobs: Sequence[Job], size: int, recalls: bool = False) -> list[list[Job]]:
    """Batches of at most `size` jobs. A batch holds questions on one text, or else jobs of one kind with prompts and
    answers of about the same length: a model reads the padding too, so lengths differ by less than a fifth. Batches of
    one keep the order of the jobs.

    Args:
        recalls: `Policy.recalls`.
    """
    if size == 1:
        return [[job] for job in jobs]
    asking = [job for job in jobs if read_apart(job, recalls)]
    if asking:
        rest = [job for job in jobs if not read_apart(job, recalls)]
        texts = [list(found) for _, found in groupby(asking, text_of)]
        shared = [text[low : low + size] for text in texts for low in range(0, len(text), size)]
        return shared + (batches(rest, size) if rest else [])

    def alike(job: Job) -> tuple[str, int]:
        return job.work.task.kind, round(4 * math.log2(len(job.prompt.ids)))

    found: list[list[Job]] = []
    for job in sorted(jobs, key=lambda job: (alike(job), job.example.max_new_tokens, len(job.prompt.ids))):
        if not found or len(found[-1]) == size or alike(found[-1][0]) != alike(job):
            found.append([])
        found[-1].append(job)
    return found


def read_apart(job: Job, recalls: bool) -> bool:
    """Whether text and question are read one after the other. A prompt is read as one where neither the policy nor the
    task asks for that."""
    return job.prompt.asks is not None and (recalls or job.example.apart)


def text_of(job: Job) -> tuple[Path, Any]:
    """A key that questions on the same text share."""
    return job.folder, job.example.id if job.prompt.asks is None else job.prompt.text
