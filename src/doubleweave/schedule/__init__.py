"""From a prompt (or arguments) to an ordered, checked list of tasks over buffers.

Imports ir, errors and the native module `_scheduling`; knows nothing of ExecuTorch, threads or where costs come from.
"""
