#!/bin/sh
# Two islands on this machine, as two separate Ray clusters: experts and router train there, and never communicate.
# For rented machines write the islands into a file of cluster_configs/compute: docs/islands.md. Usage: sh examples/two_islands.sh
ddm islands up || exit 1
trap 'ddm islands down' EXIT
ddm run experiment=digits compute=islands_local compute.retries=3 expert.training.checkpoint_every=50 name=two_islands
