"""A program's costs on a machine, and the way of running it that follows from them: profiles, planner, run.json.

Imports schedule, ir and files; knows nothing of ExecuTorch, timelines or how costs are measured.
"""
