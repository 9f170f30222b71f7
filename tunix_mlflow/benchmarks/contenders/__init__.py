"""Trainers side by side, each in a process of its own and at the benchmark's pace.

All but `ours` run in the peers' environment, where this package is found by its path alone and
nothing that it depends on is installed: `pace` and `task` import the standard library and NumPy.
"""
