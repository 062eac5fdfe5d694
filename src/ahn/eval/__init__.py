"""Measuring what is remembered.

metrics.py  how good an answer is
squad.py    articles with questions, joined to contexts of one length
"""
