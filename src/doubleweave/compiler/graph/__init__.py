"""fx graphs: our operators, and passes that change a graph and keep its numbers.

Imports torch and errors; knows nothing of segments, policies or backends.
"""
