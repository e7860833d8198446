"""Vendors' libraries on this machine: found, checked, loaded, and what they print; one Library record each.

Imports ir and errors; knows nothing of graphs, schedules or programs.
"""
