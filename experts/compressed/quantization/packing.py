"""Packed weights: groups of adjacent entries share a scale, and integers of few bits are stored without gaps.

    q = round(w / s),   s = max |w| / (2^(bits - 1) - 1) over a group,   w ~ s q

Rounding to nearest with a symmetric scale; Nagel et al. 2021 (arXiv:2106.08295, section 2.2.1). With three bits or
fewer that scale wastes a level and is too large, so `mse` searches for a better one.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

Weight = Float[Tensor, "row *rest"]
Codes = UInt8[Tensor, "row byte"]
Scales = Float[Tensor, "row group"]
Bits = Literal[2, 3, 4, 5, 6, 8]
Scaling = Literal["absmax", "mse"]

BITS: tuple[int, ...] = get_args(Bits)
CLIPS = 24
"""Candidate scales on each side of zero, from `MIN_CLIP` to 1 of the scale that clips nothing."""
MIN_CLIP = 0.35


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Bits, groups and shape of one packed weight."""

    bits: int
    """One of `BITS`."""
    group_size: int
    """Entries of a row that share a scale; the last group of a row may be shorter."""
    shape: tuple[int, ...]
    scaling: Scaling = "absmax"
    """`absmax` clips no entry; `mse` takes the candidate scale of least squared error."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for a weight that cannot be packed so."""
        is_known = self.bits in BITS and self.scaling in get_args(Scaling)
        if not is_known or self.group_size < 2 or self.group_size % 2 or len(self.shape) < 2:
            raise ValueError(
                f"a packing needs {', '.join(map(str, BITS))} bits, even groups and two axes; got {self.bits} bits, "
                f"groups of {self.group_size}, scaling {self.scaling} and shape {self.shape}"
            )

    @property
    def groups(self) -> int:
        """Return the number of groups in a row."""
        return -(-math.prod(self.shape[1:]) // self.group_size)

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row's codes."""
        return -(-self.groups * self.group_size * self.bits // 8)

    @property
    def nbytes(self) -> int:
        """Return the bytes of codes and scales together."""
        return self.shape[0] * (self.row_bytes + 2 * self.groups)


def pack(weight: Weight, packing: Packing) -> tuple[Codes, Scales]:
    """Return the codes and float16 scales of a weight."""
    rows = weight.detach().float().flatten(1)
    padded = functional.pad(rows, (0, -rows.shape[1] % packing.group_size))
    grouped = padded.reshape(len(rows), -1, packing.group_size)
    scales = grouped.abs().amax(-1) / (2 ** (packing.bits - 1) - 1)
    if packing.scaling == "mse":
        scales = _search_scales(grouped, scales, packing.bits)
    scales = scales.to(torch.float16)
    numbers = _round_to_levels(grouped, scales.float(), packing).flatten(1)
    return _join_bits((numbers + 2 ** (packing.bits - 1)).to(torch.uint8), packing.bits), scales


def unpack(codes: Codes, scales: Scales, packing: Packing) -> Weight:
    """Return the packed weight as float32; raise `ValueError` if the shapes of the parts do not fit."""
    row = packing.shape[0]
    if codes.shape != (row, packing.row_bytes) or scales.shape != (row, packing.groups):
        raise ValueError(f"codes of shape {tuple(codes.shape)} with scales {tuple(scales.shape)} for {packing}")
    count = packing.groups * packing.group_size
    numbers = _split_bits(codes, packing.bits, count).float().sub_(2 ** (packing.bits - 1))
    rows = numbers.reshape(*scales.shape, packing.group_size).mul_(scales.float().unsqueeze(-1)).flatten(1)
    weight: Weight = rows[:, : math.prod(packing.shape[1:])].reshape(packing.shape)
    return weight


def empty_codes_and_scales(packing: Packing) -> tuple[Codes, Scales]:
    """Return zero codes and scales in the shapes that `pack` returns, to be filled from a file."""
    row = packing.shape[0]
    return (
        torch.zeros(row, packing.row_bytes, dtype=torch.uint8),
        torch.zeros(row, packing.groups, dtype=torch.float16),
    )


def _round_to_levels(grouped: Tensor, scales: Tensor, packing: Packing) -> Tensor:
    """Round every entry to the nearest integer level; only `mse` scales use the lowest level."""
    highest = 2 ** (packing.bits - 1) - 1
    lowest = -highest - (packing.scaling == "mse")
    divisors = torch.where(scales != 0, scales, 1.0).unsqueeze(-1)
    return (grouped / divisors).round().clamp(lowest, highest)


def _search_scales(grouped: Tensor, largest: Tensor, bits: int) -> Tensor:
    """Return the scale of every group with the least squared error.

    A negative scale gives the additional lowest level to positive entries: with two bits, four levels instead of three.
    The scale that clips nothing is a candidate, so the error never exceeds that of `absmax`.
    """
    # argmin_s sum (w - s clamp(round(w / s), -2^(b-1), 2^(b-1) - 1))^2; Nagel et al. 2021 (arXiv:2106.08295, eq. 10)
    packing = Packing(bits=bits, group_size=2, shape=(1, 1), scaling="mse")
    full = largest * (2 ** (bits - 1) - 1) / 2 ** (bits - 1)
    ratios = torch.linspace(MIN_CLIP, 1, CLIPS).tolist()
    candidates = [largest, *(sign * ratio * full for ratio in ratios for sign in (1, -1))]
    best, least_error = largest, torch.full_like(largest, torch.inf)
    for scales in candidates:
        scales = scales.to(torch.float16).float()
        error = (_round_to_levels(grouped, scales, packing) * scales.unsqueeze(-1) - grouped).square().sum(-1)
        best, least_error = torch.where(error < least_error, scales, best), torch.minimum(error, least_error)
    return best


def _bit_positions(bits: int) -> Iterator[tuple[int, int, int]]:
    """Yield (number, byte, shift) for the numbers that fill whole bytes: with three bits, eight numbers in 3 bytes."""
    for number in range(8 // math.gcd(bits, 8)):
        yield number, number * bits // 8, number * bits % 8


def _join_bits(numbers: UInt8[Tensor, "row number"], bits: int) -> Codes:
    """Store numbers below 2^bits in bytes, the first in the lowest bits of the first byte."""
    row, count = numbers.shape
    numbers_per_block, bytes_per_block = 8 // math.gcd(bits, 8), bits // math.gcd(bits, 8)
    blocks = functional.pad(numbers, (0, -count % numbers_per_block)).reshape(row, -1, numbers_per_block)
    joined = blocks.new_zeros(row, blocks.shape[1], bytes_per_block)
    for number, byte, shift in _bit_positions(bits):
        joined[..., byte] |= blocks[..., number] << shift
        if shift + bits > 8:
            joined[..., byte + 1] |= blocks[..., number] >> (8 - shift)
    return joined.flatten(1)[:, : -(-count * bits // 8)].contiguous()


def _split_bits(codes: Codes, bits: int, count: int) -> UInt8[Tensor, "row number"]:
    """Return the first `count` numbers of every row."""
    if bits == 8:
        return codes[:, :count]
    bytes_per_block = bits // math.gcd(bits, 8)
    blocks = functional.pad(codes, (0, -codes.shape[1] % bytes_per_block)).reshape(len(codes), -1, bytes_per_block)
    numbers = []
    for _, byte, shift in _bit_positions(bits):
        number = blocks[..., byte] >> shift
        if shift + bits > 8:
            number = number | blocks[..., byte + 1] << (8 - shift)
        numbers.append(number & 2**bits - 1)
    return torch.stack(numbers, dim=-1).flatten(1)[:, :count]
