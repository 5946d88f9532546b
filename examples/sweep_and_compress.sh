#!/bin/sh
# A sweep over the number of experts and the seed, then a smaller ensemble of one of its runs.
# Usage: sh examples/sweep_and_compress.sh
ddm run -m experiment=digits partition.num_experts=2,4 seed=0,1 hydra/launcher=ddm_ray name=sweep
ddm compress runs/sweep/partition.num_experts=4,seed=0 prune=laptop prune.ratio=0.3 quantize=int4_weight_only
