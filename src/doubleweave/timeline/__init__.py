"""When tasks ran, or would run: events, traces, pictures, comparison.

Imports schedule, files and tables; knows nothing of costs or of how tasks run.
"""
