"""Draws the texts of RULER (`ahn.eval.tasks.ruler`): needles, chains of variables, words to count, questions.

A draw is given a source of randomness and a number of units of filling. The same draw with more filling has the same
facts.
"""
