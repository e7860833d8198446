"""Segments to methods, methods to one .pte file.

Imports compiler.backends, compiler.split and ir; knows nothing of sources or schedules.
"""
