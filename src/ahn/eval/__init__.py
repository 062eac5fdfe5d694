"""Measuring how much is remembered.

tasks/          the questions; one suite a file
ruler/          how the texts of RULER are drawn
records.py      files of a benchmark; articles.py: SQuAD in any of its forms
places.py       text, evidence and question in a prompt
policies/       ways to remember; one a file
kept.py         the parts of a text that a policy keeps
options.py      the options of a run
work.py         examples and prompts of tasks; prompts.py: a prompt as tokens
runner.py       runs every task with every policy and skips finished examples
batches.py      examples that are read together; rows.py: their rows of the results
description.py  the configuration beside results; results.py: their files
processes.py    many processes that share the work
metrics.py      scores of an answer, in every benchmark's own terms
statistics.py   intervals, paired differences
compare.py      groups of results that can be compared
report.py       tables and a page of results; plots.py: its plots
harness.py      the model `ahn` of lm-evaluation-harness
data/           prompts, lengths of answers and metrics of the benchmarks; words to hide
suite.py        a comparison from one file; calibrate.py: when a question is refused
"""
