"""Runs programs to learn about them: times, contention, decisions, perplexity.

Imports runtime and the packages below it; knows nothing of the command line.
"""
