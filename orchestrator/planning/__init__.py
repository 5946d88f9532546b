"""`ddm plan`: what a run would take, before it starts.

plan.py ◄── calibration.json ◄── calibrate.py, a separate process that imports torch
  │                                ├── cost_model.py       work of every stage: FLOPs, images, rows
  │                                │     └── sampling_calls.py  network calls per sampled image
  │                                ├── microbenchmarks.py  speed of the networks, here or on an island
  │                                └── dry_run.py          the stages before training, on a few hundred images
  ├── simulate.py              which stage runs when and where
  ├── estimate.py              duration, expected losses and price of one stage
  ├── transfers.py             bytes between controller and islands
  ├── synchronous_baseline.py  one monolith on one Ray cluster
  └── tables.py                output for a terminal

Nothing on the left imports torch or Ray.
"""
