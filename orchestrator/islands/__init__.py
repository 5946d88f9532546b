"""Islands: Ray clusters of other owners that train experts and do not communicate with each other.

controller ──Jobs API, token──► island ──► worker ──► experts' training
    └────────── storage: shards out, checkpoints, models and logs back ──────────┘

backend.py            all islands as one backend
placement.py          choice of the island that runs a stage
connection.py         the controller's connection to one island
client.py             one island's Ray Jobs API
worker.py             one attempt on an island
checkpoint_mirror.py  uploads checkpoints and heartbeats while an attempt trains
layout.py             names in a storage, JSON form of a job
wheel.py              this project's code as a wheel, which is sent to islands
token.py              a token in a file

storage/              folders and JSON files in a local folder or an object storage
preflight/            `ddm islands check`: finds what is wrong with an island before it costs anything
local/                `ddm islands up|down`: Ray clusters on this machine
"""
