"""Fake quantization: rounding to few bits in floating point; gradients pass wherever values are not clipped."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from experts.compressed.quantization.packing import Packing, Weight

Column = Float[Tensor, "row *ones"]

MIN_SCALE = 1e-8
"""Lower bound of scales, so that zeros stay zero."""
MIN_STEP = 2.0**-24
"""Lower bound of the steps of static grids, the smallest float16."""
CLIPS, MIN_CLIP = 40, 0.2
"""Number of candidate ranges of a static scale, from `MIN_CLIP` of the full range up to all of it."""


def straight_through(exact: Float[Tensor, "*shape"], rounded: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return `rounded`, with the gradient of `exact` (Bengio et al. 2013, arXiv:1308.3432)."""
    return exact + (rounded - exact).detach()


def scaled_gradient(scale: Float[Tensor, "*shape"], factor: float) -> Float[Tensor, "*shape"]:
    """Return `scale`, with its gradient multiplied by `factor`."""
    return (scale - scale * factor).detach() + scale * factor


def fake_quantize_groups(
    x: Float[Tensor, "*batch feature"], bits: int, group: int, is_unsigned: bool
) -> Float[Tensor, "*batch feature"]:
    """Round every group of `group` adjacent entries of a row with a dynamic scale.

    Signed levels range from -(2^(bits - 1) - 1) to 2^(bits - 1) - 1, unsigned ones from 0 to 2^bits - 1; negative
    entries then become zero.
    """
    # Li et al. 2025 (SVDQuant, arXiv:2411.05007, section 3): q = round(x / s), s = max |x| / q_max over the group.
    width = x.shape[-1]
    grouped = functional.pad(x, (0, -width % group)).reshape(*x.shape[:-1], -1, group)
    highest = 2**bits - 1 if is_unsigned else 2 ** (bits - 1) - 1
    largest = (grouped if is_unsigned else grouped.abs()).amax(-1, keepdim=True)
    scales = largest.clamp_min(MIN_SCALE) / highest
    numbers = (grouped / scales).round().clamp(0 if is_unsigned else -highest, highest)
    rounded: Tensor = (numbers * scales).flatten(-2)[..., :width]
    return rounded


def fake_quantize_at(
    x: Float[Tensor, "*shape"], steps: Float[Tensor, "..."], zeros: Float[Tensor, "..."], bits: int
) -> Float[Tensor, "*shape"]:
    """Round on a static grid; `steps` and integer `zeros` broadcast to `x`."""
    # x^ = s (clip(round(x / s) + z, 0, 2^b - 1) - z). Its gradient by s is round(x / s) - x / s inside the grid and
    # the clipped number outside: Esser et al. 2020 (LSQ, arXiv:1902.08153, equation 3).
    numbers = x / steps
    numbers = straight_through(numbers, numbers.round()) + zeros
    return (numbers.clamp(0, 2**bits - 1) - zeros) * steps


def search_grids(samples: Float[Tensor, "grid sample"], bits: int) -> tuple[Float[Tensor, " grid"], ...]:
    """Return step, a float16, and zero point of every row's grid of least squared error; zero is a level."""
    low, high = samples.amin(1).clamp_max(0), samples.amax(1).clamp_min(0)
    best, least_error = torch.zeros(2, len(samples), device=samples.device), torch.full_like(low, torch.inf)
    for clip in torch.linspace(MIN_CLIP, 1, CLIPS).tolist():
        steps = ((high - low) * clip / (2**bits - 1)).clamp_min(MIN_STEP).half().float()
        zeros = (-low * clip / steps).round().clamp_max(2**bits - 1)
        error = (fake_quantize_at(samples, steps[:, None], zeros[:, None], bits) - samples).square().mean(1)
        best = torch.where(error < least_error, torch.stack([steps, zeros]), best)
        least_error = torch.minimum(error, least_error)
    return best[0], best[1]


def round_to_integers(weight: Weight, scales: Float[Tensor, "row 1"], bits: int) -> Weight:
    """Return weight / scale of its row, rounded and clipped to signed integers of `bits` bits; passes gradients."""
    column = _column(scales, weight.ndim)
    numbers = weight / torch.where(column != 0, column, 1.0)
    return straight_through(numbers, numbers.round()).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def fake_quantize_weight(weight: Weight, scales: Float[Tensor, "row 1"], bits: int) -> Weight:
    """Round a weight with one static scale a row; passes gradients."""
    return round_to_integers(weight, scales, bits) * _column(scales, weight.ndim)


def encode_with_scales(weight: Weight, scales: Float[Tensor, "row 1"], packing: Packing) -> UInt8[Tensor, "row byte"]:
    """Return the codes that `unpack` decodes to `fake_quantize_weight`; for 4 or 8 bits and one group a row."""
    numbers = round_to_integers(weight.detach(), scales, packing.bits).flatten(1)
    padded = functional.pad(numbers, (0, packing.group_size - numbers.shape[1]))
    codes = (padded + 2 ** (packing.bits - 1)).to(torch.uint8)
    joined: Tensor = codes[:, ::2] | codes[:, 1::2] << 4 if packing.bits == 4 else codes
    return joined


def _column(scales: Float[Tensor, "row 1"], ndim: int) -> Column:
    return scales.float().reshape(-1, *[1] * (ndim - 1))
