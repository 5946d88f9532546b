"""Weights in few bits: neighbours in a row share a scale, and the bits of a row's numbers lie without gaps.

    q = round(w / s),   s = max |w| / (2^(bits - 1) - 1) over a group,   w ~ s q

Rounding to nearest with a symmetric scale; Nagel et al. 2021 (arXiv:2106.08295, section 2.2.1). With three bits or
less that scale wastes a level and is too large, so one of `mse` is searched instead.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

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
"""Scales that are tried on each side of zero, from `LEAST_CLIP` to 1 of the one that clips nothing."""
LEAST_CLIP = 0.35


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How one weight is packed."""

    bits: Bits
    group_size: int
    """Entries of a row that share a scale; the last group of a row may be shorter."""
    shape: tuple[int, ...]
    scaling: Scaling = "absmax"
    """`absmax`: no entry is clipped. `mse`: the scale with the least squared error among those tried."""

    @classmethod
    def parsed(cls, found: Mapping[str, Any]) -> "Packing":
        """From JSON; raises `KeyError`, `TypeError` or `ValueError`."""
        bits, group, shape = found["bits"], int(found["group_size"]), tuple(int(side) for side in found["shape"])
        scaling = found.get("scaling", "absmax")
        is_known = bits in BITS and scaling in get_args(Scaling)
        if not is_known or group < 2 or group % 2 or len(shape) < 2:
            raise ValueError(f"a packing of {bits} bits, groups of {group}, scaling {scaling} and shape {shape}")
        return cls(bits=bits, group_size=group, shape=shape, scaling=scaling)

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return -(-math.prod(self.shape[1:]) // self.group_size)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's codes."""
        return -(-self.groups * self.group_size * self.bits // 8)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return self.shape[0] * (self.row_bytes + 2 * self.groups)


def pack(weight: Weight, packing: Packing) -> tuple[Codes, Scales]:
    """Codes and float16 scales of a weight."""
    rows = weight.detach().float().flatten(1)
    padded = functional.pad(rows, (0, -rows.shape[1] % packing.group_size))
    grouped = padded.reshape(len(rows), -1, packing.group_size)
    scales = grouped.abs().amax(-1) / (2 ** (packing.bits - 1) - 1)
    if packing.scaling == "mse":
        scales = _least_error(grouped, scales, packing.bits)
    scales = scales.to(torch.float16)
    numbers = _rounded(grouped, scales.float(), packing).flatten(1)
    return _joined((numbers + 2 ** (packing.bits - 1)).to(torch.uint8), packing.bits), scales


def unpack(codes: Codes, scales: Scales, packing: Packing) -> Weight:
    """The weight that `pack` kept, float32; raises `ValueError` if the parts do not fit."""
    row = packing.shape[0]
    if codes.shape != (row, packing.row_bytes) or scales.shape != (row, packing.groups):
        raise ValueError(f"codes of shape {tuple(codes.shape)} with scales {tuple(scales.shape)} for {packing}")
    count = packing.groups * packing.group_size
    numbers = _parted(codes, packing.bits, count).float().sub_(2 ** (packing.bits - 1))
    rows = numbers.reshape(*scales.shape, packing.group_size).mul_(scales.float().unsqueeze(-1)).flatten(1)
    weight: Weight = rows[:, : math.prod(packing.shape[1:])].reshape(packing.shape)
    return weight


def empty_parts(packing: Packing) -> tuple[Codes, Scales]:
    """Codes and scales in the shapes that `pack` gives, all zero, to be filled from a file."""
    row = packing.shape[0]
    return (
        torch.zeros(row, packing.row_bytes, dtype=torch.uint8),
        torch.zeros(row, packing.groups, dtype=torch.float16),
    )


def _rounded(grouped: Tensor, scales: Tensor, packing: Packing) -> Tensor:
    """The nearest number of every entry; only a scale that was searched uses the lowest level."""
    highest = 2 ** (packing.bits - 1) - 1
    lowest = -highest - (packing.scaling == "mse")
    divisors = torch.where(scales != 0, scales, 1.0).unsqueeze(-1)
    return (grouped / divisors).round().clamp(lowest, highest)


def _least_error(grouped: Tensor, largest: Tensor, bits: int) -> Tensor:
    """The scale of every group with the least squared error; negative where the lowest level serves a positive entry.

    One lowest level more than on the other side: with two bits, four levels instead of three. The scale that clips
    nothing is among those tried, so the error is never larger than with it.
    """
    # argmin_s sum (w - s clamp(round(w / s), -2^(b-1), 2^(b-1) - 1))^2; Nagel et al. 2021 (arXiv:2106.08295, eq. 10)
    packing = Packing(bits=bits, group_size=2, shape=(1, 1), scaling="mse")  # type: ignore[arg-type]
    full = largest * (2 ** (bits - 1) - 1) / 2 ** (bits - 1)
    ratios = torch.linspace(LEAST_CLIP, 1, CLIPS).tolist()
    tried = [largest, *(sign * ratio * full for ratio in ratios for sign in (1, -1))]
    best, least = largest, torch.full_like(largest, torch.inf)
    for scales in tried:
        scales = scales.to(torch.float16).float()
        error = (_rounded(grouped, scales, packing) * scales.unsqueeze(-1) - grouped).square().sum(-1)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def _places(bits: int) -> Iterator[tuple[int, int, int]]:
    """(number, byte, shift) of the numbers that fill whole bytes together: three bits are eight numbers in 3 bytes."""
    for number in range(8 // math.gcd(bits, 8)):
        yield number, number * bits // 8, number * bits % 8


def _joined(numbers: UInt8[Tensor, "row number"], bits: int) -> Codes:
    """Numbers below 2^bits as bytes, the first in the lowest bits of the first byte."""
    row, count = numbers.shape
    taken, filled = 8 // math.gcd(bits, 8), bits // math.gcd(bits, 8)
    blocks = functional.pad(numbers, (0, -count % taken)).reshape(row, -1, taken)
    joined = blocks.new_zeros(row, blocks.shape[1], filled)
    for number, byte, shift in _places(bits):
        joined[..., byte] |= blocks[..., number] << shift
        if shift + bits > 8:
            joined[..., byte + 1] |= blocks[..., number] >> (8 - shift)
    return joined.flatten(1)[:, : -(-count * bits // 8)].contiguous()


def _parted(codes: Codes, bits: int, count: int) -> UInt8[Tensor, "row number"]:
    """The first `count` numbers of every row."""
    if bits == 8:
        return codes[:, :count]
    filled = bits // math.gcd(bits, 8)
    blocks = functional.pad(codes, (0, -codes.shape[1] % filled)).reshape(len(codes), -1, filled)
    numbers = []
    for _, byte, shift in _places(bits):
        found = blocks[..., byte] >> shift
        if shift + bits > 8:
            found = found | blocks[..., byte + 1] << (8 - shift)
        numbers.append(found & 2**bits - 1)
    return torch.stack(numbers, dim=-1).flatten(1)[:, :count]
