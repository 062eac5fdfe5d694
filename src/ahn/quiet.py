"""Hides progress bars and log chatter of the libraries that load models."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from functools import partialmethod


class _Shared:
    """A change that all threads see. The first thread that asks makes it, and the last one undoes it."""

    def __init__(self, change: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self.change, self.lock, self.users = change, threading.Lock(), 0

    @contextlib.contextmanager
    def made(self) -> Iterator[None]:
        with self.lock:
            if not self.users:
                self.undo = contextlib.ExitStack()
                self.undo.enter_context(self.change())
            self.users += 1
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if not self.users:
                    self.undo.close()


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    with contextlib.ExitStack() as undo:
        for name in ("torchao", "torch.utils._pytree"):
            log = logging.getLogger(name)
            undo.callback(log.setLevel, log.level)
            log.setLevel(logging.ERROR)
        yield


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    from tqdm.auto import tqdm
    from transformers.utils import logging as hf_logging

    with contextlib.ExitStack() as undo:
        if hf_logging.is_progress_bar_enabled():
            undo.callback(hf_logging.enable_progress_bar)
            hf_logging.disable_progress_bar()
            # the GGUF loader draws its own bar and does not ask hf_logging
            undo.callback(setattr, tqdm, "__init__", tqdm.__init__)
            tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
        yield


_chatter, _bars = _Shared(_without_chatter), _Shared(_without_bars)


@contextlib.contextmanager
def quiet(bars: bool = False) -> Iterator[None]:
    """Hide the loaders' progress bars, unless `bars`, and the chatter of torchao's import.

    Warnings about the base still show.
    """
    with _chatter.made(), contextlib.nullcontext() if bars else _bars.made():
        yield
