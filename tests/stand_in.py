"""A small suite of tasks in the place of the real ones, which other tests are about."""

import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ahn.errors import ConfigError

WORDS = ["the", "old", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "twelve", "mice", "while"]


@dataclass(frozen=True)
class Example:
    id: str
    prompt: str
    answers: tuple[str, ...]
    chat: bool
    max_new_tokens: int
    evidence: tuple[int, int] | None = None
    depth: float | None = None
    answer_prefix: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    asks: int | None = None
    question: str = ""
    needs: tuple[tuple[tuple[int, int], ...], ...] = ()


class Needle:
    """A number in a text, which is asked for."""

    name, suite, kind = "standin/needle", "standin", "generate"

    def examples(self, *, tokenizer, length, data, seed, limit):
        if data is not None and not (Path(data) / "needle.txt").exists():
            raise ConfigError(f"{data}: no needle.txt")
        for i in range(limit or 7):
            words = [WORDS[(i + j + seed) % len(WORDS)] for j in range((length or 120) // 3)]
            at = len(words) * i // 7
            before, needle = " ".join(words[:at]) + " ", f"The number is {i}."
            prompt = before + needle + " " + " ".join(words[at:]) + "\nWhich number?"
            evidence = None if i == 3 else (len(before), len(before + needle))
            cut = {"evidence_cut": True} if evidence is None else {}
            yield Example(str(i), prompt, (str(i),), True, 4, evidence, i / 7, " It is", cut)

    def score(self, example, prediction):
        return (sum(map(ord, prediction)) + int(example.id)) % 11 / 10  # random models are never right

    def truncate(self, ids, limit):
        return ids[:limit]


class Text(Needle):
    """Texts whose loss is measured."""

    name, kind = "standin/text", "loss"

    def examples(self, *, tokenizer, length, data, seed, limit):
        for i in range(limit or 3):
            yield Example(f"book{i}", " ".join(WORDS[i:] * 200), (), False, 0)


def module() -> types.ModuleType:
    """What stands in for `ahn.eval.tasks`."""
    tasks = {"standin/needle": Needle, "standin/text": Text}
    found = types.ModuleType("ahn.eval.tasks")
    found.names = lambda: list(tasks)
    found.groups = lambda: {"standin": list(tasks)}

    def expand(names):
        for name in names:
            if name not in (*tasks, "standin"):
                raise ConfigError(f"unknown task {name!r}; did you mean 'standin/needle'?")
        return [tasks[one]() for name in names for one in (list(tasks) if name == "standin" else [name])]

    found.expand = expand
    return found


def put_in_place(monkeypatch=None) -> None:
    import sys

    import ahn.eval

    if monkeypatch is None:
        sys.modules["ahn.eval.tasks"] = ahn.eval.tasks = module()
    else:
        monkeypatch.setitem(sys.modules, "ahn.eval.tasks", module())
        monkeypatch.setattr(ahn.eval, "tasks", sys.modules["ahn.eval.tasks"], raising=False)
