"""Standard error of the commands, and the forms of numbers there."""

from __future__ import annotations

import logging

from rich.console import Console

console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def size(count: float) -> str:
    """Bytes in decimal units, three figures: 47.2 MB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.{0 if unit == 'B' or count >= 99.95 else 1 if count >= 9.995 else 2}f} {unit}"


def counted(number: int, thing: str) -> str:
    """1 passage, 2 passages."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """In units that suit it: 45 s, 12 min, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def show_log() -> None:
    """Print the package's log, such as the conversion of a base, as lines on standard error."""
    log = logging.getLogger("ahn")
    if not log.handlers:
        log.setLevel(logging.INFO)
        log.addHandler(handler := logging.Handler())
        handler.emit = lambda record: console.print(record.getMessage())  # type: ignore[method-assign]
