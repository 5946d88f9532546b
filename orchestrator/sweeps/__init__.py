"""Sweeps: many runs under one budget, at once, each a controller process of its own.

`plugins.py` is what Hydra calls, `study.py` is what Optuna knows; `drive.py` walks the trials, `pool.py` runs them,
`budget.py` is what they share. A sweep's state is its run folders (and, with Optuna, one journal), so the same command
run again goes on where the last one was killed.
"""
