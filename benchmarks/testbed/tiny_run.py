"""The smallest run that has every kind of stage of the digits."""

TINY = (
    "experiment=digits",
    "compute.backoff_s=0",
    "wandb.mode=disabled",
    "data.limit=160",
    "data.shard_samples=64",
    "partition.num_fine=8",
    "partition.components=4",
    "codec.components=4",
    "expert.training.steps=6",
    "expert.training.batch_size=8",
    "expert.training.checkpoint_every=2",
    "expert.network.width=8",
    "expert.network.depth=1",
    "router.training.steps=4",
    "router.width=8",
    "router.depth=1",
    "scores.num_samples=16",
    "scores.components=4",
    "ensemble.steps=2",
)
"""Settings of a complete run of minimal size, in the process of its controller."""
