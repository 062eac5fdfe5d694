"""Measuring what is remembered.

tasks/         what is asked; one suite a file; articles.py: SQuAD in any of its forms
policies/      ways to remember; one a file
runner.py      every task with every policy, what is not done yet; results.py: the files of it
processes.py   the same by many processes
prompts.py     a task's text as tokens
metrics.py     how good an answer is, in every benchmark's own terms
statistics.py  intervals, paired differences
compare.py     which results can be compared
report.py      tables and a page of results; plots.py: its plots
harness.py     the model `ahn` of lm-evaluation-harness
data/          prompts, lengths of answers and metrics of the benchmarks; words to hide
suite.py       a comparison from one file; calibrate.py: when a question is refused
"""
