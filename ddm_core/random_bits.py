"""Random numbers without state: the ids of the random streams, and a hash that mixes 64 bits."""

from enum import IntEnum

import numpy as np
from jaxtyping import UInt64

Bits = UInt64[np.ndarray, "..."]


class Stream(IntEnum):
    """Ids of the random streams; `derive_seed` mixes an id, a seed and an index into a generator's seed.

    Two uses of randomness with different ids are independent, also under the same seed and index. A new use gets a new
    id below `EXPERT_SAMPLES`. An id never changes, because the bits of earlier results depend on it.
    """

    EPOCH_ORDER = 0
    """The permutation of the samples; indexed by epoch."""
    TRAINING_NOISE = 1
    """t and dropped conditions of a training batch; indexed by step."""
    TRAINING_STEP = 2
    """Random numbers inside the network, such as dropout; indexed by step."""
    SCORE_IDENTITY = 7
    """Noise and t of score identity distillation; indexed by step."""
    CONSISTENCY = 8
    """Noise and t of consistency training; indexed by step."""
    BUCKET_ORDER = 9
    """The order of the batches of images of different sizes; indexed by epoch."""
    FLIP = 10
    """Which samples are mirrored; indexed by epoch."""
    HELD_OUT_NOISE = 11
    """Noise of a held-out sample, at every t and step; indexed by its hash."""
    TAR_ORDER = 12
    """The order of the tars of streamed samples; indexed by epoch."""
    BLOCK_ORDER = 13
    """The order of the samples of a block of tars; indexed by the blocks of all epochs."""
    MEAN_FLOW = 14
    """Ends of the jumps of a mean flow's training; indexed by step."""
    SPEEDUP = 15
    """Scales and negative conditions of a training of guidance in one call; indexed by step."""
    ROW_NOISE = 16
    """Noise of the rows of a training batch; indexed by step and block of rows."""
    EXPERT_SAMPLES = 1000
    """Initial noise of the latents that expert k generates for the router is stream `EXPERT_SAMPLES + k`; indexed by
    row. It is the last id, so that the streams of any number of experts collide with no other."""


def splitmix64_finalize(bits: Bits) -> Bits:
    """Return `bits` after the finalizer of SplitMix64, a one-to-one mixing function.

    Steele et al. 2014, doi:10.1145/2660193.2660195, figure 16.
    """
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Bits = bits ^ (bits >> np.uint64(31))
    return mixed
