"""Weights in few bits: neighbours in a row share a scale, and two numbers of four bits share a byte.

    q = round(w / s),   s = max |w| / (2^(bits - 1) - 1) over a group,   w ~ s q

Rounding to nearest with a symmetric scale; Nagel et al. 2021 (arXiv:2106.08295, section 2.2.1).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

Weight = Float[Tensor, "row *rest"]
Codes = UInt8[Tensor, "row byte"]
Scales = Float[Tensor, "row group"]

CODES, SCALES = ".codes", ".scales"
"""What is put behind a weight's name in a packed file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How one weight is packed."""

    bits: Literal[4, 8]
    group: int
    """Entries of a row that share a scale; the last group of a row may be shorter."""
    shape: tuple[int, ...]

    @classmethod
    def parsed(cls, found: Mapping[str, Any]) -> "Packing":
        """From JSON; raises `KeyError`, `TypeError` or `ValueError`."""
        packing = cls(bits=found["bits"], group=int(found["group"]), shape=tuple(int(side) for side in found["shape"]))
        if packing.bits not in (4, 8) or packing.group < 2 or packing.group % 2 or len(packing.shape) < 2:
            raise ValueError(f"a packing of {asdict(packing)}")
        return packing


def pack(weight: Weight, packing: Packing) -> tuple[Codes, Scales]:
    """Codes and float16 scales of a weight."""
    rows = weight.detach().float().flatten(1)
    padded = functional.pad(rows, (0, -rows.shape[1] % packing.group))
    grouped = padded.reshape(len(rows), -1, packing.group)
    largest = 2 ** (packing.bits - 1) - 1
    scales = (grouped.abs().amax(-1) / largest).to(torch.float16)
    divisors = torch.where(scales > 0, scales.float(), 1.0).unsqueeze(-1)
    numbers = (grouped / divisors).round().clamp(-largest, largest).flatten(1)
    codes = (numbers + largest + 1).to(torch.uint8)
    return (codes[:, ::2] | codes[:, 1::2] << 4 if packing.bits == 4 else codes), scales


def unpack(codes: Codes, scales: Scales, packing: Packing) -> Weight:
    """The weight that `pack` kept, float32; raises `ValueError` if the parts do not fit."""
    if packing.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
    if codes.shape != (packing.shape[0], scales.shape[-1] * packing.group) or len(scales) != len(codes):
        raise ValueError(f"codes of shape {tuple(codes.shape)} with scales {tuple(scales.shape)} for {packing}")
    numbers = codes.float() - 2 ** (packing.bits - 1)
    rows = (numbers.reshape(*scales.shape, packing.group) * scales.float().unsqueeze(-1)).flatten(1)
    weight: Weight = rows[:, : math.prod(packing.shape[1:])].reshape(packing.shape)
    return weight
