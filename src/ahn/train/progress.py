"""What a run says while it runs: a line for each entry of its log, and in a terminal a bar below them."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback


class Progress(TrainerCallback):
    """Only the first process speaks, on standard error."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens  # of a step, all processes together

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        hidden = None if state.is_world_process_zero else True  # None: where standard error is no terminal
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", leave=False, disable=hidden)
        self.since, self.step = time.monotonic(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if not state.is_world_process_zero or "loss" not in logs:  # the entry at the end of a run sums it up
            return
        now = time.monotonic()
        speed = (state.global_step - self.step) * self.tokens / (now - self.since)
        self.since, self.step = now, state.global_step
        width = len(f"{state.max_steps:,}")
        line = (
            f"step {state.global_step:>{width},} of {state.max_steps:,}   loss {logs['loss']:<9.4g}   gradient "
            f"{logs['grad_norm']:<9.3g}   lr {logs['learning_rate']:.2e}   {speed:>9,.0f} tokens/s"
        )
        tqdm.write(line, file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


class GateProgress:
    """The same for the gates of a store: called with the losses of all steps so far.

    Args:
        steps: in all. tokens: of a step. hidden: this process says nothing.
    """

    EVERY = 10  # steps a line

    def __init__(self, steps: int, tokens: int, hidden: bool) -> None:
        self.steps, self.tokens, self.hidden = steps, tokens, hidden
        self.bar = tqdm(total=steps, unit="step", leave=False, disable=True if hidden else None)
        self.since = time.monotonic()

    def __call__(self, losses: list[float]) -> None:
        self.bar.update()
        if not self.hidden and len(losses) % self.EVERY == 0:
            now = time.monotonic()
            speed, self.since = self.EVERY * self.tokens / (now - self.since), now
            last, width = losses[-self.EVERY :], len(f"{self.steps:,}")
            line = f"gates {len(losses):>{width},} of {self.steps:,}   loss {sum(last) / len(last):<9.4g}"
            tqdm.write(f"{line}   {speed:>9,.0f} tokens/s", file=sys.stderr)
        if len(losses) == self.steps:
            self.bar.close()
