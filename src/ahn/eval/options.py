"""The options that all tasks and policies of one run share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ahn.eval.kept import RECALLED, Kept, Stored
from ahn.recall import Recall


@dataclass(frozen=True)
class Options:
    """The options of a run.

    Args:
        base: hub id, folder, GGUF file, or "smollm2-135m".
        window, sinks, adapter, store, recall, yarn: see `Kept`.
        dtype, device: see `policies.base.Policy`.
        data: a folder or a file with the benchmarks' data. None: from the hub, or generated.
        seed: of everything that is drawn.
        limit: examples of a task, at most.
        batch: examples that are read at once, at most. They may come from different tasks and have about the same
            length.
        share: set where window and sinks together are 1/share of each length. A report then shows the lengths together.
    """

    base: str
    window: int
    sinks: int
    adapter: str | None = None
    store: Stored | None = None
    recall: Recall = RECALLED
    dtype: str | None = None
    device: str | None = None
    yarn: float | None = None
    data: Path | None = None
    seed: int = 0
    limit: int | None = None
    batch: int = 1
    share: int | None = None

    @property
    def kept(self) -> Kept:
        return Kept(self.window, self.sinks, self.adapter, self.yarn, self.store, self.recall)
