"""When tasks ran, or would run: events, traces, pictures, comparison.

Imports schedule, files and tables; knows nothing of how tasks run or what they cost.
"""
