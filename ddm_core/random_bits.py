"""Numbers without a state: a function that scrambles 64 bits."""

import numpy as np
from jaxtyping import UInt64

Bits = UInt64[np.ndarray, "..."]


def splitmix64_finalize(bits: Bits) -> Bits:
    """The finaliser of SplitMix64, one to one (Steele et al. 2014, doi:10.1145/2660193.2660195, figure 16)."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    finished: Bits = bits ^ (bits >> np.uint64(31))
    return finished
