"""What ran, or would run, when: events, traces, pictures, comparison.

Imports schedule, files and tables; knows nothing of how tasks run.
"""
