"""The comparison of docs/results.md, in whatever time there is: the most important cells first, any number of sittings.

    python benchmarks/evaluate.py DATA --model BASE=ADAPTER ... --prompts PROMPTS --prepare     # no GPU: minutes
    python benchmarks/evaluate.py DATA --model BASE=ADAPTER ... --prompts PROMPTS --output RESULTS --seconds 480
    ahn report RESULTS -o report.html

DATA holds `benchmarks`, `qa` and `books`. Every step of `STEPS` is done with every model that has a third of the
positions for it, with 1/8 of the tokens lossless; first with a third of the examples and the policies that matter most,
then with all policies, then with all examples; `--steps` takes some of them, for several GPUs with a folder of results
each (`ahn report` takes several). Results are files, written batch by batch: what is there is not done
again, and a step that fails is named and left out. `--prepare` makes the prompts beforehand, so that no GPU waits for a
tokenizer, and says what a run costs. `--divide 4` is the same in small, for a rehearsal on a CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import SHARE, keep, kept, run_in_memory, stored

if TYPE_CHECKING:
    from ahn.eval.runner import Options, Work

LOSSLESS = 8  # part of a text's tokens
FIRST = ["window", "ahn", "full", "compressive-avg"]
REST = ["ahn-zeroed", "compressive-max"]
TOKENS = 1 << 20  # in a batch, at most
ROWS = 128  # likewise
STRIDE = 3  # the first round does every third example


@dataclass(frozen=True)
class Step:
    """`tasks` and the data of each, at a `length` (None: the records' own, about `about`), `examples` of each."""

    name: str
    tasks: tuple[tuple[str, str | None], ...]
    length: int | None
    examples: int
    about: int = 0

    @property
    def size(self) -> int:
        return self.length or self.about


def _ruler(length: int, examples: int) -> Step:
    generated = tuple((task, None) for task in ("ruler/niah", "ruler/vt", "ruler/cwe", "ruler/fwe"))
    return Step(f"ruler-{length}", (*generated, ("ruler/qa", "qa")), length, examples)


def _passkey(length: int, examples: int) -> Step:
    data = f"benchmarks/infinitebench-passkey-{length}.jsonl.xz"
    return Step(f"passkey-{length}", (("infinitebench/passkey", data),), length, examples)


def _books(length: int, examples: int) -> Step:
    return Step(f"books-{length}", (("perplexity/text", "books/valid.jsonl.xz"),), length, examples)


def _squad(length: int, examples: int) -> Step:
    return Step(f"squad-{length}", (("squad/spread", "qa"),), length, examples)


STEPS = (
    _squad(8192, 63),
    _passkey(8192, 60),
    _books(16384, 12),
    _ruler(4096, 12),
    _ruler(8192, 12),
    _ruler(16384, 6),
    _squad(16384, 42),
    _passkey(16384, 30),
    _ruler(32768, 3),
    Step("multifieldqa_zh", (("longbench/multifieldqa_zh", "benchmarks"),), None, 60, about=4096),
)


@dataclass(frozen=True)
class Plan:
    """A step with a model."""

    step: Step
    options: Options
    file: Path | None

    @property
    def name(self) -> str:
        return f"{self.step.name}, {Path(self.options.base).name}"

    def works(self, data: Path) -> list[Work]:
        """The prompts: those of the file, if there is one."""
        from ahn.errors import AHNError
        from ahn.eval import tasks
        from ahn.eval.runner import prepare

        if self.file is not None and self.file.is_file():
            return kept(self.file)
        made: list[Work] = []
        whole = True
        for name, source in self.step.tasks:
            options = replace(self.options, data=source and data / source)
            for task in tasks.expand([name]):
                try:
                    made += prepare([task], [self.step.length], options)
                except AHNError as error:
                    whole = False
                    print(f"{self.name}: without {task.name}: {error}", flush=True)
        if self.file is not None and whole:
            keep(self.file, made)
        return made


def plans(
    models: Sequence[str], folder: Path | None, divide: int, device: str | None, names: Sequence[str] | None = None
) -> list[Plan]:
    """All steps, or those of these names, with all models that can have them, in order."""
    from ahn.bases import base_config
    from ahn.eval.policies.base import exact_sizes
    from ahn.eval.runner import Options

    found = []
    for step in STEPS:
        if names and step.name not in names:
            continue
        length = step.length and step.length // divide
        step = replace(step, length=length, about=step.about // divide, examples=max(STRIDE, step.examples // divide))
        for model in models:
            base, _, adapter = model.partition("=")
            config = base_config(base)
            positions = config.get_text_config().max_position_embeddings
            if step.size > 3 * positions:
                continue
            window, sinks = exact_sizes(config, adapter or None, step.size // LOSSLESS, None)
            yarn = 1 if step.size < positions else 2 if step.size < 2 * positions else 4
            options = Options(
                base,
                window,
                sinks,
                adapter=adapter or None,
                device=device,
                yarn=yarn if yarn > 1 else None,
                limit=step.examples,
                share=LOSSLESS,
                batch=max(1, min(ROWS, TOKENS // (step.size * divide))),
            )
            file = folder and folder / f"{step.name}-{step.examples}-{Path(base).name}-{divide}.pickle.xz"
            found.append(Plan(step, options, file))
    return found


def rounds() -> Iterator[tuple[str, list[str], int]]:
    yield "a third of the examples, the policies that matter most", FIRST, STRIDE
    yield "a third of the examples, all policies", REST, STRIDE
    yield "all examples, the policies that matter most", FIRST, 1
    yield "all examples, all policies", REST, 1


def thinned(work: Work, stride: int) -> Work:
    return replace(work, examples=work.examples[::stride], prompts=work.prompts[::stride])


def able(plan: Plan, names: Sequence[str], works: Sequence[Work]) -> list[str]:
    """The policies that can read these prompts: without an adapter `window` and `full`, without positions no `full`."""
    from ahn.bases import base_config
    from ahn.errors import AHNError
    from ahn.eval import policies

    config, found = base_config(plan.options.base), []
    for name in names:
        try:
            for work in works:
                policies.get(name).check(config, work.longest, **plan.options.memory)
            found.append(name)
        except AHNError as error:
            print(f"{plan.name}: without {name}: {error}", flush=True)
    return found


def say_cost(plan: Plan, works: Sequence[Work]) -> None:
    """Tokens read by one policy, and steps of decoding."""
    from ahn.eval.runner import Job, batches

    jobs = [Job(w, e, p, Path()) for w in works for e, p in zip(w.examples, w.prompts, strict=True)]
    read = sum(len(job.prompt.ids) for job in jobs)
    steps = sum(max(job.example.max_new_tokens for job in batch) for batch in batches(jobs, plan.options.batch))
    print(
        f"{plan.name:<48}{len(jobs):>6} examples{read:>12,} tokens{steps:>7,} steps of decoding, a policy", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", action="append", required=True, metavar="BASE[=ADAPTER]")
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--prompts", type=Path, metavar="FOLDER", help="of prepared prompts")
    parser.add_argument("--prepare", action="store_true", help="make the prompts, say what a run costs, and stop")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--divide", type=int, default=1, help="lengths and numbers of examples by this")
    parser.add_argument("--device")
    parser.add_argument("--store", metavar="NAME[:SPAN]", help="measure each adapter with a store, too")
    parser.add_argument("--share", type=float, default=SHARE, help="of the window's places, for the store")
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS], metavar="STEP")
    given = parser.parse_args()
    begun = time.monotonic()
    planned = plans(given.model, given.prompts, given.divide, given.device, given.steps)
    if given.prepare:
        for plan in planned:
            say_cost(plan, plan.works(given.data))
        return

    from ahn.bases import load_base

    models: dict[str, Any] = {}
    prompts: dict[str, list[Work]] = {}
    failed: set[str] = set()

    def left() -> float:
        return given.seconds - (time.monotonic() - begun)

    def stop() -> bool:
        return left() < 0

    for title, policies, stride in rounds():
        print(f"== {title}", flush=True)
        for plan in planned:
            if stop():
                print("time is over: the same command goes on from here", flush=True)
                return
            if plan.name in failed:
                continue
            at = time.monotonic()
            try:
                base = plan.options.base
                if base not in models:
                    models[base] = load_base(base, device=given.device)
                if plan.name not in prompts:
                    prompts[plan.name] = plan.works(given.data)
                works = [thinned(work, stride) for work in prompts[plan.name]]
                ways = [(able(plan, policies, works), plan.options)]
                if given.store and plan.options.adapter and "ahn" in policies:
                    ways.append(
                        (["ahn"], replace(plan.options, store=stored(given.store, plan.options.window, given.share)))
                    )
                for names, options in ways:
                    run_in_memory(works, names, options, given.output, stop, models[base])
            except Exception as error:  # one cell that fails must not cost the others
                failed.add(plan.name)
                models.pop(plan.options.base, None)
                print(f"{plan.name}: FAILED: {type(error).__name__}: {error}", flush=True)
            took = time.monotonic() - at
            print(f"{plan.name}: {', '.join(policies)}: {took:.0f} s, {left():.0f} s left", flush=True)
    print("all is done" + (f", but {', '.join(sorted(failed))}" if failed else ""), flush=True)


if __name__ == "__main__":
    main()
