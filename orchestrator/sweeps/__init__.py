"""Sweeps: many runs in parallel under shared resources, each a controller process of its own.

Hydra calls `hydra_entry.py`, `launcher.py` and `optuna_sweeper.py`. `study.py` holds Optuna's state. `loop.py` starts
the trials, `trial_pool.py` runs them, and `resources.py` is what they share. A sweep's state is its run folders and,
with Optuna, one journal, so repeating the command after a crash continues the sweep.
"""
