"""Reading documents with their names, pages and characters, so that sources can name them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahn.dialogue import Dialogue
from ahn.documents import expand
from ahn.engine.prefill import Progress, check_cache, read
from ahn.memory.cache import AHNCache
from ahn.texts import Given, Sources, Text
from ahn.tokens import digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def read_documents(
    model: PreTrainedModel,
    tokenizer: Any,
    documents: str | Path | Sequence[str | Path] | Mapping[str, str | Sequence[str]],
    cache: AHNCache | None = None,
    *,
    archive: str = "text",
    progress: Progress | None = None,
) -> AHNCache:
    """Read documents into a memory, as `ahn read` does. The sources of answers then name document, page and character.

    Files that the memory holds already, by name and text, are skipped with a warning in the log.

    Args:
        model, tokenizer: of one base.
        documents: a file, folder or pattern, or several; or texts by their names, each a text or a list of its pages.
        cache: a memory to append to. Default: a new one.
        archive: of a new memory, as of `AHNCache`.
        progress: as of `ahn.read`.

    Returns:
        the memory.

    Raises:
        DocumentError: a document that cannot be read. What stands before it is in `cache` if that is given.
        ConfigError, UnsupportedOperationError, KeyboardInterrupt: as of `ahn.read`.
    """
    memory = AHNCache(model, archive) if cache is None else check_cache(cache)
    if memory.archive is not None and not memory.tokens_seen:
        memory.archive.tokenizer = digest(tokenizer)
    earlier = memory.texts
    if memory.tokens_seen and not earlier:
        earlier = [{"tokens": memory.tokens_seen, "sha256": "", "complete": True}]
    if isinstance(documents, Mapping):
        sources: Sources = Given(documents)
    else:
        sources = Sources(expand([documents] if isinstance(documents, str | Path) else documents))
    for known in sources.drop_known([known for text in earlier for known in text.get("documents", [])]):
        logger.warning("%s: skipped, because the memory holds it already", known)
    if not sources.sources:
        return memory
    dialogue = Dialogue.of(tokenizer)
    stream = dialogue.stream_more(sources, earlier[-1]["complete"]) if earlier else dialogue.stream(sources)
    text = Text(stream, sources)
    text.keep_places(memory)

    def note(done: int, total: int | None) -> None:
        text.note(done)
        if progress is not None:
            progress(done, text.total)

    complete = False
    try:
        read(model, text, memory, progress=note)
        complete = True
    finally:
        if text.read:
            memory.texts = [*earlier, text.described(complete)]
    return memory
