"""What a program costs on a machine, and so which way of running it is chosen: profiles, auto, planner, run.json.

Imports schedule, timeline, ir and files; knows nothing of ExecuTorch.
"""
