"""Vendors' libraries on this machine: found, checked and loaded, and their output; one Library record each.

Imports ir and errors; knows nothing of graphs, schedules or programs.
"""
