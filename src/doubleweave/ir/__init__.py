"""A compiled program as plain data that prints and parses: split, interface, sizes, manifest, chat template.

Imports errors; knows nothing of torch, ExecuTorch or schedules.
"""
