"""Programs opened and run: program folders, loaded methods, threads.

Imports predict, timeline, schedule, vendors, ir and the native module `_native`; knows nothing of torch or compiling.
"""
