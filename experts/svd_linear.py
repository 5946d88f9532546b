"""A linear layer of few bits beside a thin one of sixteen, which takes what few bits cannot hold.

    x^ = (x + shift) / smooth,    y = x^ down^T up^T + Q(x^) Q(R)^T + bias

Li et al. 2025 (SVDQuant), arXiv:2411.05007, section 4.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from experts.fake_quant import rounded_in_groups
from experts.packing import Packing, empty_parts, pack, unpack


@dataclass(frozen=True, slots=True, kw_only=True)
class SVDShape:
    """What an empty layer is made from."""

    packing: Packing
    """Of the residual R."""
    rank: int
    """Width of the thin layer; 0 is none."""
    activation_bits: Literal[4, 8] | None
    """Bits of the residual's input, which is rounded row by row in groups as large as the residual's; None does not
    round it."""
    is_unsigned: bool
    """Whether the input, shifted, has no negative entries, so that no bit is spent on a sign."""
    has_bias: bool

    @classmethod
    def parsed(cls, found: Mapping[str, Any]) -> "SVDShape":
        """From JSON; raises `KeyError`, `TypeError` or `ValueError`."""
        shape = cls(
            packing=Packing.parsed(found["packing"]),
            rank=int(found["rank"]),
            activation_bits=found["activation_bits"],
            is_unsigned=bool(found["is_unsigned"]),
            has_bias=bool(found["has_bias"]),
        )
        is_linear = len(shape.packing.shape) == 2 and 0 <= shape.rank <= min(shape.packing.shape)
        if shape.activation_bits not in (4, 8, None) or not is_linear:
            raise ValueError(f"a layer of {asdict(shape)}")
        return shape


class SVDLinear(nn.Module):
    """Takes the place of a `torch.nn.Linear`."""

    FORM: ClassVar[str] = "svd_linear"
    codes: UInt8[Tensor, "out byte"]
    scales: Float[Tensor, "out group"]
    smooth: Float[Tensor, " in"]
    shift: Float[Tensor, "1"]
    down: Float[Tensor, "rank in"]
    up: Float[Tensor, "out rank"]
    bias: Float[Tensor, " out"] | None

    def __init__(self, shape: SVDShape) -> None:
        """Empty: it gives its bias, which is zero."""
        super().__init__()
        self.shape = shape
        self.out_features, self.in_features = shape.packing.shape
        codes, scales = empty_parts(shape.packing)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("smooth", torch.ones(self.in_features, dtype=torch.float16))
        self.register_buffer("shift", torch.zeros(1))
        self.register_buffer("down", torch.zeros(shape.rank, self.in_features, dtype=torch.float16))
        self.register_buffer("up", torch.zeros(self.out_features, shape.rank, dtype=torch.float16))
        self.register_buffer("bias", torch.zeros(self.out_features) if shape.has_bias else None)

    def settings(self) -> dict[str, Any]:
        """Its shape."""
        return asdict(self.shape)

    def hold(self, residual: Float[Tensor, "out in"]) -> None:
        """Keep the residual in few bits."""
        for kept, found in zip((self.codes, self.scales), pack(residual, self.shape.packing), strict=True):
            kept.copy_(found)

    def residual(self) -> Float[Tensor, "out in"]:
        """What is kept of the residual."""
        return unpack(self.codes, self.scales, self.shape.packing)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """In the type of `x`."""
        smoothed = (x.float() + self.shift) / self.smooth.float()
        said = functional.linear(self._rounded(smoothed), self.residual(), self.bias)
        if self.shape.rank:
            said = said + functional.linear(functional.linear(smoothed, self.down.float()), self.up.float())
        return said.to(x.dtype)

    def _rounded(self, smoothed: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        shape = self.shape
        if shape.activation_bits is None:
            return smoothed
        return rounded_in_groups(smoothed, shape.activation_bits, shape.packing.group, shape.is_unsigned)


def place_svd_linear(model: nn.Module, path: str, settings: Mapping[str, Any]) -> None:
    """Put an empty form in the place of a linear layer; `ValueError` if there is none of that shape."""
    found, shape = model.get_submodule(path), SVDShape.parsed(settings)
    if not isinstance(found, nn.Linear) or tuple(found.weight.shape) != shape.packing.shape:
        raise ValueError(f"{path} of the network is no linear layer of shape {shape.packing.shape}")
    model.set_submodule(path, SVDLinear(shape))
