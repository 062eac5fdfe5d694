"""Recall: find the few passages of the text that a question asks for, and read them again in front of it."""

from ahn.dialogue import NOT_FOUND
from ahn.recall.ask import RECALL, Answer, Found, Recall, Source, alone, as_text, ask, check, find, not_found, search

__all__ = [
    "NOT_FOUND",
    "RECALL",
    "Answer",
    "Found",
    "Recall",
    "Source",
    "alone",
    "as_text",
    "ask",
    "check",
    "find",
    "not_found",
    "search",
]
