"""What a compiled program is, as plain data that prints and parses: split, interface, sizes, manifest.

Imports errors; knows nothing of torch, ExecuTorch, schedules or files other than the manifest.
"""
