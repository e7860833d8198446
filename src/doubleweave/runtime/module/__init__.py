"""Any compiled module as callables, states and futures.

Imports runtime's instances and threads, timeline, schedule and ir; knows nothing of tokens or text.
"""
