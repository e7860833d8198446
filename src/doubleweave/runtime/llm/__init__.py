"""A compiled language model: session, cache, text, sampling, generation.

Imports runtime.module and what is below it; knows nothing of measuring or printing.
"""
