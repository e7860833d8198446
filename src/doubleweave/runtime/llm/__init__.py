"""A compiled language model: session, cache, text, sampling, generation.

Imports runtime, runtime.module and what is below them; knows nothing of measuring or printing.
"""
