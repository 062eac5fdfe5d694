"""Measuring what is remembered.

metrics.py   how good an answer is, in every benchmark's own terms
tasks/       what is asked; one suite a file
data/        prompts, lengths of answers and metrics of the benchmarks; words to hide
articles.py  SQuAD in any of its forms
squad.py     articles with questions, joined to contexts of one length
"""
