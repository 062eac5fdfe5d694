"""The call that a thread is in: transformers does not hand it to an attention function."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

from torch import Tensor


class Calls(threading.local):
    """The attention module that this thread is in, its input [B, T, D] and its cache. transformers does not pass them
    to the attention function, so a hook before the module leaves them here."""

    now: tuple[Any, Tensor, Any] | None = None


calls = Calls()


class Full(NamedTuple):
    """The functions that `full_attention` puts in the place of a memory."""

    observe: Any
    attend: Any
