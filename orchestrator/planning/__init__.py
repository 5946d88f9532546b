"""What a run would take, before it takes it: `ddm plan`.

plan.py ◄── calibration.json ◄── calibrate.py, a process of its own with torch
  │                                ├── work.py       what every stage has to do: FLOPs, images, bytes
  ├── schedule.py   who runs when  ├── speeds.py     how quick the networks are here, or on an island (probes.py)
  ├── risk.py       what spot costs├── rehearsal.py  the stages before training, on a few hundred images
  ├── synchronised.py  one monolith on one Ray cluster
  └── tables.py     all of it for a terminal

Nothing on the left imports torch or Ray.
"""
