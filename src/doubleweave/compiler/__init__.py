"""Source or module in, program folder out.

Imports sources, predict, vendors, ir and torch; never the run time.
"""
