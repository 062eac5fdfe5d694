"""Recall: find the few passages of what was read that a question asks for, and read them again in front of it."""

from ahn.recall.ask import RECALL, Answer, Source, as_text, ask, find

__all__ = ["RECALL", "Answer", "Source", "as_text", "ask", "find"]
