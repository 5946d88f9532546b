"""Islands: Ray clusters of other owners that train experts and never meet.

controller ──Jobs API, token──► island ──► worker ──► experts' training
    └────────── storage: shards out, checkpoints, models and logs back ──────────┘

client.py     one island's Ray Jobs API          storage.py   folders in a local or object storage
backend.py    all islands as one backend         line.py      one island as the controller sees it
placement.py  which island runs a stage          worker.py    one attempt on an island
local.py      Ray clusters on this machine, to try it with    wheel.py   our code, as it is sent
check.py      what is wrong with an island, before it costs anything
"""
