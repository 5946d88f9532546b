"""Tensor types that several modules share, each named for its quantity and shape."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, UInt8
from torch import Tensor

Latents = Float[Tensor, "batch *latent"]
Times = Float[Tensor, "..."]
"""t as one number, one number a row, or any tensor that broadcasts to the sample."""
RowTimes = Float[Tensor, " batch"]
"""t as one number a row."""
ClassIndex = Int[Tensor, " batch"]
"""Rows of a class embedding; the null class is the last one."""
RowIds = Int[Tensor, " row"]
"""Identifiers of samples of one trajectory, or their positions in a batch."""
NoiseSource = Callable[[int], Latents]
"""Return fresh noise of the same samples for a draw index; draw 0 is the noise at which sampling starts."""
Images = UInt8[np.ndarray, "batch height width channel"]
"""Images in storage, 0 to 255."""
DecodedImages = Float[Tensor, "batch height width channel"]
"""Images in [0, 1]."""
ImageTensor = Float[Tensor, "batch channel height width"]
"""Images in [-1, 1] as networks read them."""
