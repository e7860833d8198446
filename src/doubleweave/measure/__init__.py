"""Runs programs to learn about them: times, contention, decisions, perplexity.

Imports runtime and what is below it; knows nothing of the command line.
"""
