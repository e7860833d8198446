"""Graphs to segments, functions and values, and rewrites of a split that keep its numbers.

Imports compiler.trace, compiler.graph, the policy and ir; knows nothing of backends or recipes.
"""
