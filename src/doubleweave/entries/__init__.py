"""Entry points of compiling: a model in, a program folder out that was held against it, or no folder at all.

Imports check and below; knows nothing of the command line.
"""
