"""Source or module in, program folder out.

Imports sources, predict, vendors, ir and torch, and `_native` to load what it made; never the run time.
"""
