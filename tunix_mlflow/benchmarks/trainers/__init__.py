"""One file per trainer, each a process of its own that pauses when the benchmark says.

All but `ours` run in the peers' environment, where this package is on the path and none of its
dependencies are installed: `pace` and `task` import the standard library and NumPy only.
"""
