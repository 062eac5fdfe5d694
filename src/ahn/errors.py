"""Everything `ahn` raises on purpose. Each message names the value that was wrong and what is allowed."""

import re
from collections.abc import Callable, Sequence
from typing import Any


class AHNError(Exception):
    """Base of all errors of this package. Its text is always one line, even if it quotes several.

    Args:
        message: may name a setting as `{recall}`. Python then reads `recall=512`, the command line `--recall 512`.
        settings: the value of each setting that the message names.
    """

    def __init__(self, message: str = "", /, **settings: Any) -> None:
        super().__init__(message)
        self.message, self.settings = str(message), settings

    def __str__(self) -> str:
        return self.told(lambda name, value: f"{name}={value!r}")

    def told(self, named: Callable[[str, Any], str]) -> str:
        """The text, with each setting written by `named(name, value)`."""
        text = " ".join(self.message.splitlines())
        if not self.settings:
            return text
        return re.sub(rf"{{({'|'.join(self.settings)})}}", lambda at: named(at[1], self.settings[at[1]]), text)


class ConfigError(AHNError, ValueError):
    """A setting that cannot be honoured: a window of 0, an unknown cell, more tokens than the base has positions."""


class UnsupportedModelError(AHNError, ValueError):
    """A base model whose attention cannot be split into sinks, window and memory. Says which part is missing."""


class UnsupportedOperationError(AHNError, NotImplementedError):
    """Something a memory that forgets cannot do, such as rolling back tokens."""


class BaseModelError(AHNError, ValueError):
    """A base model or tokenizer that cannot be found or read."""


class AdapterError(AHNError, ValueError):
    """Trained weights that do not fit: another base, missing or extra tensors, NaN, an unknown version."""


class TrainingError(AHNError, RuntimeError):
    """A training run that cannot go on: a full disk, a lost GPU, too little memory. Says where to resume."""


class MemoryFileError(AHNError, ValueError):
    """A memory file that is damaged, of another model, or of another version."""


class OutputError(AHNError, OSError):
    """A file that cannot be written: no regular file, read-only, no such folder, a full disk."""


class DocumentError(AHNError, ValueError):
    """A document that is missing, empty or not text."""


class EngineError(AHNError, RuntimeError):
    """A batch engine that is closed, was not started, or has failed."""


class EvalError(AHNError, ValueError):
    """A measurement that cannot be made: an unknown task or metric, missing data, a library that is not installed."""


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of many names, for a message."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
