"""Gives a transformers model memories, and undoes it."""
