"""Holds compiled programs against their sources: the last step of compiling, by the run time that users have.

Imports compiler, runtime and below; knows nothing of the command line.
"""
