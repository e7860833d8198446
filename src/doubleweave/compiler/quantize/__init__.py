"""Weights in fewer bits, the text that calibrates them, and how much noise they add.

Imports compiler.split and ir; knows nothing of backends.
"""
