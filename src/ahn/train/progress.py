"""Reports a run while it runs: a line for each entry of its log, and in a terminal a progress bar below them."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback


class Progress(TrainerCallback):
    """Prints on standard error, in the first process only."""

    def __init__(self, label: str, tokens: int) -> None:
        self.label = label  # precedes the number of a step
        self.tokens = tokens  # of a step, all processes together

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        hidden = None if state.is_world_process_zero else True  # None: hidden if standard error is no terminal
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", leave=False, disable=hidden)
        self.since, self.step = time.monotonic(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if not state.is_world_process_zero or "loss" not in logs:  # the last entry of a run is a summary
            return
        now = time.monotonic()
        speed = (state.global_step - self.step) * self.tokens / (now - self.since)
        self.since, self.step = now, state.global_step
        width = len(f"{state.max_steps:,}")
        line = (
            f"{self.label} {state.global_step:>{width},} of {state.max_steps:,}   loss {logs['loss']:<9.4g}   gradient "
            f"{logs['grad_norm']:<9.3g}   lr {logs['learning_rate']:.2e}   {speed:>9,.0f} tokens/s"
        )
        tqdm.write(line, file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()
