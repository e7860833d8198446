"""The command line: each command parses its options, calls one function and shows the result.

Imports every package; no package imports it.
"""
