"""fx graphs: their nodes, our operators, and passes that change a graph and keep its numbers.

Imports torch, transformers and errors; knows nothing of segments, policies or backends.
"""
