"""Any compiled module as callables, states and futures.

Imports runtime and what is below it; knows nothing of tokens or text.
"""
