"""Programs opened and run: loaded methods, threads, memory.

Imports predict, timeline, schedule, vendors, ir and the native module `_native`; knows nothing of torch or compiling.
"""
