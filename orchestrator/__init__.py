"""The only package that uses Ray, Hydra and the command line.

    cli ─► config ─► graph ─► runner ─► backend (inline | ray | islands | slurm) ─► worker ─► stage function

`pipeline/graph.py` defines the stages of a run, `config/stage_kinds.py` maps each kind to its function,
`run/runner.py` runs the graph, and `run/run_folder.py` holds all state of a controller.
"""
