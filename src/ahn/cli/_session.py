"""A model with one memory, for the commands: load it, read with progress, stream answers.

Answers go to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ahn.cli._checks import check_asked, check_before_loading, header_of
from ahn.cli._console import console, counted, duration, show_log, size
from ahn.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ahn.memory.cache import AHNCache
    from ahn.recall import Found
    from ahn.texts import Text

QUIET_S = 10  # seconds between two progress lines, if there is no terminal for a bar
SIZES = "window", "lossless", "sinks", "store", "store_size"  # with any of these the window is not widened
EXACT = 512_000_000  # bytes: a text whose cache fits into them is kept whole
ASKING = 16  # 1/16 of the tokens that may be kept stays free after a text, for questions and answers


def how_far(text: Text, before: int = 0, between: str = "/") -> str:
    """How many tokens of a text are read, and of how many where that is known. `before`: tokens of earlier texts."""
    if text.total is not None:
        return f"{before + text.read:,}{between}{counted(before + text.total, 'token')}"
    share = "" if text.fraction is None else f" ({text.fraction:.1%} of {size(text.sources.bytes or 0)})"
    return f"{counted(before + text.read, 'token')}{share}"


@dataclass
class Answer:
    ids: Tensor
    seconds: float | None  # None: nothing was generated
    stopped: bool  # by Ctrl-C
    cut: bool  # at the greatest length allowed

    @property
    def summary(self) -> str:
        if self.seconds is None:
            return "nothing generated"
        count = self.ids.shape[-1]
        speed = f"{counted(count, 'token')} in {self.seconds:.1f} s ({count / self.seconds:,.1f} tokens/s)"
        return f"{speed}, cut at --max-new-tokens" if self.cut else speed


class Session:
    """Model, tokenizer and cache.

    Args:
        args: with the options of `add_model`.
        memory: a memory file to go on from; it names base and adapter. None: an empty memory.
        question: one that will be asked. It is checked before the model is loaded.
    """

    def __init__(self, args: argparse.Namespace, memory: str | None = None, question: str | None = None) -> None:
        header = header_of(memory, args) if memory else {}
        show_log()
        base = args.base or header.get("base") or "smollm2-135m"
        with console.status(f"loading {base}"):
            import transformers

            from ahn.adapter import NONE, from_pretrained
            from ahn.bases import base_config, load_tokenizer
            from ahn.cost import Shape
            from ahn.dialogue import Dialogue
            from ahn.engine.generate import end_tokens
            from ahn.memory.cache import AHNCache
            from ahn.memory.file_contents import check_base

            transformers.logging.set_verbosity_error()
            config = header.get("config", {})
            adapter = args.adapter or header.get("adapter")
            if header and not adapter and not config["cell"]:
                adapter = NONE  # it was read without a memory, so it goes on without the shipped one
            found = check_before_loading(args, header, base, adapter)
            self.tokenizer = load_tokenizer(base)
            if memory:
                check_base(memory, base_config(base))
            if question is not None:
                check_asked(args, header, self.tokenizer, question)
            self.model = from_pretrained(
                base,
                found,
                window=config.get("window", args.window),
                sinks=config.get("sinks", args.sinks),
                cell=config.get("cell", args.cell),
                store=(config.get("store") or "none") if header else args.store,
                store_size=config.get("store_size", args.store_size) or None,
                store_span=config.get("store_span", args.store_span),
                lossless=None if header else args.lossless,
                dtype=args.dtype or str(header.get("dtype", "")).removeprefix("torch.") or None,
                device=args.device,
            )
            self.dialogue = Dialogue.of(self.tokenizer)
            best = "text" if self.model.ahn_retrieval is None else "keys"
            self._archive = getattr(args, "archive", None) or best
            self.cache: AHNCache = AHNCache.load(memory, self.model) if memory else self._new_cache()
        self.base = base
        self._allowed = 0 if any(getattr(args, name) for name in SIZES) else EXACT if args.exact is None else args.exact
        self._per_token = Shape.from_config(self.model.config).kv_elements(1) * self.model.dtype.itemsize
        self._ends = end_tokens(self.model, self.tokenizer)
        self._unread: Tensor | None = None  # generated, but not in the cache yet
        self._wanted = adapter != NONE
        if memory:
            self.introduce()

    def _new_cache(self) -> AHNCache:
        from ahn.memory.cache import AHNCache
        from ahn.tokens import digest

        cache = AHNCache(self.model, self._archive)
        if cache.archive is not None:
            cache.archive.tokenizer = digest(self.tokenizer)
        return cache

    def introduce(self, text: Text | None = None) -> None:
        """Print a description of this memory. If all of `text` fits into the tokens that may be kept exactly, the
        window is widened for it first."""
        total = self._fitted(text) if text is not None and not self.cache.tokens_seen else None
        console.print(self._kind(total))

    def _fitted(self, text: Text) -> int | None:
        """The number of tokens of the text, if it fits the positions of the base and the bytes allowed; else None.

        The window becomes as wide as both allow, so that more can be appended. Buffers grow with the text.
        """
        from ahn.hf.architecture import most_lossless
        from ahn.hf.augment import set_window

        config, layers = self.model.ahn_config, self.cache.layers
        each = self._per_token + sum(layer.gate_width for layer in layers) * self.model.dtype.itemsize
        most, positions = self._allowed // each, most_lossless(self.model.config.get_text_config())
        most = most if positions is None else min(most, positions)
        if most <= config.lossless:
            return None
        total = text.within(most - config.store_size - most // ASKING)
        if total is not None:
            set_window(self.model, most - config.sinks - config.store_size, config.sinks)
            self.cache = self._new_cache()
        return total

    def _kind(self, total: int | None) -> str:
        """A line that describes this memory. `total`: tokens of a text that it keeps whole."""
        from ahn import zoo
        from ahn.adapter_files import base_shape

        settings, store, wanted = self.model.ahn_config, "", self._wanted
        if settings.store:
            spans = f" in spans of {settings.store_span}" if settings.store_span > 1 else ""
            store = f"{counted(settings.store_size, 'chosen one')} ({settings.store}{spans}), "
        exact = f"exact: the first {counted(settings.sinks, 'token')}, {store}the last {settings.window:,}"
        if total is not None:
            exact = f"exact: all {total:,} tokens, room for {settings.sinks + settings.window:,}"
        if adapter := self.model.ahn_names["adapter"]:
            return f"memory  {adapter}; {exact}"
        what = f"the window with sinks{' and a store' if store else ''} only"
        if settings.cell:
            what = f"an untrained {settings.cell} memory, which adds nothing"
        shipped = zoo.made_for(self.base, base_shape(self.model.config))
        hint = f" (to try: --adapter {', '.join(shipped)})" if shipped and wanted else ""
        return f"no trained memory{'' if shipped else f' for {self.base}'}: running {what}{hint}; {exact}"

    @property
    def exact(self) -> bool:
        """Whether nothing that was read has left the window."""
        config = self.cache.config
        return 0 < self.cache.tokens_seen <= config.sinks + config.window

    @property
    def held(self) -> str:
        seen = self.cache.tokens_seen
        full = size(seen * self._per_token)
        kept = f"kept exactly: all {counted(seen, 'token')}; " if self.exact else ""
        archive = "" if self.cache.archive is None else f"; archive {size(self.cache.archive.nbytes)} on the host"
        return f"{kept}cache {size(self.cache.nbytes)}, full attention would hold {full}{archive}"

    def check(self, question: str, args: argparse.Namespace) -> None:
        """Raises ConfigError if `find` cannot be asked this, before anything is read."""
        from ahn.recall import Recall, check

        check(self.tokenizer, self.cache, question, Recall(args.recall, args.finder, args.rounds))

    def find(
        self,
        question: str,
        args: argparse.Namespace,
        prompt: Callable[[str, str], Tensor] | None = None,
        judge: bool = True,
    ) -> Found:
        """Find the passages for a question, judge whether the text supports an answer, and print both.

        Args:
            args: with the options of `add_recall`. prompt: as of `ahn.recall.search`. judge: as of `Recall`.
        """
        from ahn.recall import Recall, search

        began = time.monotonic()
        found = search(
            self.model,
            self.tokenizer,
            self.cache,
            question,
            Recall(args.recall, args.finder, args.rounds, judge),
            prompt and (lambda text, passages: self._with_unread(prompt(text, passages))),
        )
        if found.sources:
            tokens, seconds = sum(source.end - source.start for source in found.sources), time.monotonic() - began
            read = f"{counted(len(found.sources), 'passage')}, {counted(tokens, 'token')}"
            console.print(f"recall  {read}, found in {seconds:.2f} s")
        if not found.supported:
            hint = "this answer is a guess" if args.guess else "--guess answers anyway"
            console.print(f"support the text does not seem to answer this; {hint}")
        return found

    def say(self, ids: Tensor | None = None) -> Answer:
        """Print that the text supports no answer.

        Args:
            ids: [1, T], the prompt. The memory then continues as if the model had generated this answer. None: the
                memory stays as it is.
        """
        import torch

        from ahn.engine.prefill import read
        from ahn.recall import NOT_FOUND, not_found

        new = not_found(self.tokenizer)[None]
        print(NOT_FOUND)
        if ids is not None:
            read(self.model, torch.cat([self._with_unread(ids), new[:, :-1]], 1), self.cache)
            self._unread = new[:, -1:]
        return Answer(new, None, stopped=False, cut=False)

    def show(self, found: Found, question: str, args: argparse.Namespace) -> None:
        """Print the passages that the answer was given, with their places; without any, how to get some.

        Args:
            args: with the options of `add_recall`.
        """
        from ahn.recall import RECALL, Recall, check

        for number, source in enumerate(found.sources, 1):
            console.print(f"[{number}]     {source.place}", style="bold")
            console.print(" ".join(source.text.split()), style="dim")
        if not found.sources:
            hint = ""
            with suppress(ConfigError):  # it would be refused
                check(self.tokenizer, self.cache, question, Recall(RECALL, args.finder, args.rounds))
                hint = "" if args.recall else f" (--recall {RECALL} finds some)"
            console.print(f"no passage was read again{hint}")

    def _with_unread(self, ids: Tensor) -> Tensor:
        """`ids` [1, T] after the generated tokens that are not in the cache yet."""
        import torch

        return ids if self._unread is None else torch.cat([self._unread, ids], 1)

    def read(self, text: Text, chunk: int | None) -> str:
        """Read into the cache, showing progress, and return a summary. KeyboardInterrupt leaves the cache usable."""
        from ahn.engine.prefill import read

        began, before, exact = time.monotonic(), self.cache.tokens_seen, self.exact
        if text.total != text.read:
            with self._progress(text, began) as progress:

                def note(done: int, total: int | None) -> None:
                    text.note(text.skipped + done)
                    progress(done, text.total)

                read(self.model, text, self.cache, chunk, note)
        if exact and not self.exact:
            room = self.cache.config.sinks + self.cache.config.window
            console.print(
                f"exact   no longer all: {self.cache.tokens_seen:,} tokens are more than the room for {room:,}"
            )
        seconds, tokens = max(time.monotonic() - began, 1e-3), self.cache.tokens_seen - before
        return f"{counted(tokens, 'token')} in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s); {self.held}"

    def answer(self, ids: Tensor, limit: int) -> Answer:
        """Stream the answer to the prompt `ids` [1, T] to standard output. Ctrl-C stops it after the current token."""
        import torch
        from transformers import StoppingCriteriaList, TextStreamer

        from ahn.engine.generate import generate
        from ahn.interrupts import finish_before_interrupt

        ids = self._with_unread(ids)
        began, end = time.monotonic(), self.cache.tokens_seen + ids.shape[1]
        with finish_before_interrupt() as interrupted:

            def stop(seen: Tensor, scores: Any) -> Tensor:
                return torch.full((seen.shape[0],), interrupted.is_set(), device=seen.device)

            new = generate(
                self.model,
                ids,
                self.cache,
                max_new_tokens=limit,
                do_sample=False,
                pad_token_id=self.tokenizer.eos_token_id,  # never used for one row, but asked for
                streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                stopping_criteria=StoppingCriteriaList([stop]),
            ).cpu()
            stopped = interrupted.is_set()
        unread = end + new.shape[1] - self.cache.tokens_seen
        self._unread = new[:, new.shape[1] - unread :]
        cut = not stopped and new.shape[1] == limit and int(new[0, -1]) not in self._ends
        return Answer(new, time.monotonic() - began, stopped, cut)

    def answer_from(self, found: Found, question: str, limit: int) -> Answer:
        """Stream the answer to a question from the passages found, or from the memory where there are none."""
        from ahn.memory.cache import AHNCache
        from ahn.recall import alone

        if not found.sources:
            return self.answer(self.dialogue.question(question), limit)
        memory, self.cache = self.cache, AHNCache(self.model)
        try:
            return self.answer(alone(self.tokenizer, question, found.sources), limit)
        finally:
            self.cache, self._unread = memory, None

    def turn(self, ids: Tensor, recalled: Tensor | None, limit: int) -> Answer:
        """`answer` to the prompt `ids`, or to `recalled`: the same prompt with passages in front of the question.

        The memory continues without the passages, so those of earlier turns do not pile up.
        """
        if recalled is None:
            return self.answer(ids, limit)
        import torch

        from ahn.engine.prefill import read
        from ahn.recall.question import apart

        memory, said = self.cache, self._with_unread(ids)
        self.cache = apart(memory)
        try:
            answer = self.answer(recalled, limit)
        finally:
            self.cache = memory
        read(self.model, torch.cat([said, answer.ids[:, :-1]], 1), self.cache)
        self._unread = answer.ids[:, -1:]
        return answer

    @contextmanager
    def _progress(self, text: Text, began: float) -> Iterator[Any]:
        def state(done: int) -> str:
            seconds, fraction = time.monotonic() - began, text.fraction
            full = size(self.cache.tokens_seen * self._per_token)
            speed = f"{done / max(seconds, 1e-9):,.0f}/s"
            if fraction and text.total is None:
                speed += f", {duration(seconds * (1 - fraction) / fraction)} left"
            return f"{how_far(text)}, {speed}, cache {size(self.cache.nbytes)} (full attention {full})"

        if not console.is_terminal:
            told = began
            if text.total is None:  # a long text
                console.print(f"reading {state(0)}")

            def line(done: int, total: int | None) -> None:
                nonlocal told
                if time.monotonic() - told > QUIET_S:
                    told = time.monotonic()
                    console.print(f"reading {state(done)}")

            yield line
            return

        from rich.progress import BarColumn, Progress, TextColumn

        columns = TextColumn("reading"), BarColumn(bar_width=None), TextColumn("{task.fields[state]}")
        with Progress(*columns, console=console, transient=True, expand=True) as bar:
            task = bar.add_task("", total=None if text.fraction is None else 1.0, state=state(0))
            yield lambda done, total: bar.update(task, completed=text.fraction or 0, state=state(done))
