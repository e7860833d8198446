"""The command line: parse, one call, show the result.

Imports everything; imported by nothing.
"""
