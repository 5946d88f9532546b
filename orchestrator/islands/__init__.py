"""Islands: Ray clusters of other owners that train experts and never meet.

controller ──Jobs API, token──► island ──► worker ──► experts' training
    └────────── storage: shards out, checkpoints, models and logs back ──────────┘

client.py     one island's Ray Jobs API          storage.py   folders in a local or object storage
backend.py    all islands as one backend         line.py      one island as the controller sees it
placement.py  which island runs a stage          worker.py    one attempt on an island
layout.py     names in a storage, jobs as they are sent       mirror.py    what a training has, kept in the storage
wheel.py      our code, as it is sent             token.py     a token in a file
commands.py   `ddm islands check|up|down`

check.py asks what is wrong with an island before it costs anything: from outside (check_outside.py) and by a visit to
it (visit.py, probe.py, check_inside.py). local.py is Ray clusters on this machine, to try it with: head.py starts one,
marked.py finds and keeper.py ends its processes, listed.py writes their configuration. Below storage.py: trees.py,
tree_index.py and snapshot.py for folders, objects.py, local_objects.py and remote_objects.py for single files.
"""
