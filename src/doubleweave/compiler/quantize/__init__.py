"""Weights in fewer bits, the text that calibrates them, and how much noise they add.

Imports compiler.split and compiler.graph; knows nothing of backends.
"""
