"""The only room that knows Ray, Hydra and the command line.

    cli ─► compose ─► config ─► graph ─► runner ─► backend (inline | ray) ─► worker ─► a stage function of a room below

`graph.py` says what there is to do, `stage_functions.py` which function does it, `runner.py` walks the graph,
`run_folder.py` is everything a controller knows: it keeps no state anywhere else.
"""
