"""A linear layer of few bits beside a thin one of more, which takes what few bits cannot hold.

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

from experts.compressed.quantization.fake_quant import fake_quantize_groups
from experts.compressed.quantization.packing import Packing, empty_parts, pack, unpack


@dataclass(frozen=True, slots=True, kw_only=True)
class SVDShape:
    """What an empty layer is made from."""

    packing: Packing
    """Of the residual R."""
    rank: int
    """Width of the thin layer; 0 is none."""
    branch_bits: Literal[8, 16]
    """Bits of its weights."""
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
            branch_bits=found["branch_bits"],
            activation_bits=found["activation_bits"],
            is_unsigned=bool(found["is_unsigned"]),
            has_bias=bool(found["has_bias"]),
        )
        is_linear = len(shape.packing.shape) == 2 and 0 <= shape.rank <= min(shape.packing.shape)
        if shape.activation_bits not in (4, 8, None) or shape.branch_bits not in (8, 16) or not is_linear:
            raise ValueError(f"a layer of {asdict(shape)}")
        return shape

    @property
    def branch(self) -> tuple[Packing, Packing]:
        """How the two weights of a thin layer of eight bits are kept, the second one turned over."""
        out, into = self.packing.shape
        sizes = ((self.rank, into), (self.rank, out))
        down, up = (Packing(bits=8, group_size=BRANCH_GROUP, shape=size, scaling="absmax") for size in sizes)
        return down, up


BRANCH_GROUP = 64
"""Weights of a thin layer of eight bits that share a scale."""

Branch = tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]


def rounded_branch(down: Float[Tensor, "rank in"], up: Float[Tensor, "out rank"], shape: SVDShape) -> Branch:
    """The two weights of the thin layer as they will be kept."""
    if shape.branch_bits == 16 or not shape.rank:
        return down.to(torch.float16).float(), up.to(torch.float16).float()
    kept = [unpack(*pack(one, packing), packing) for one, packing in zip((down, up.t()), shape.branch, strict=True)]
    return kept[0], kept[1].t()


class SVDLinear(nn.Module):
    """Takes the place of a `torch.nn.Linear`."""

    KIND: ClassVar[str] = "svd_linear"
    codes: UInt8[Tensor, "out byte"]
    scales: Float[Tensor, "out group"]
    smooth: Float[Tensor, " in"]
    shift: Float[Tensor, "1"]
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
        for name, packing in zip(("down", "up"), shape.branch, strict=True):
            if shape.branch_bits == 16:
                self.register_buffer(name, torch.zeros(packing.shape, dtype=torch.float16))
            else:
                for part, empty in zip(("codes", "scales"), empty_parts(packing), strict=True):
                    self.register_buffer(f"{name}_{part}", empty)
        self.register_buffer("bias", torch.zeros(self.out_features) if shape.has_bias else None)

    def settings(self) -> dict[str, Any]:
        """Its shape."""
        return asdict(self.shape)

    def set_residual(self, residual: Float[Tensor, "out in"]) -> None:
        """Keep the residual in few bits."""
        for kept, found in zip((self.codes, self.scales), pack(residual, self.shape.packing), strict=True):
            kept.copy_(found)

    def set_low_rank(self, down: Float[Tensor, "rank in"], up: Float[Tensor, "out rank"]) -> None:
        """Keep the thin layer's weights."""
        for name, packing, weight in zip(("down", "up"), self.shape.branch, (down, up.t()), strict=True):
            if self.shape.branch_bits == 16:
                self.get_buffer(name).copy_(weight)
            else:
                for part, found in zip(("codes", "scales"), pack(weight, packing), strict=True):
                    self.get_buffer(f"{name}_{part}").copy_(found)

    def low_rank_weights(self) -> Branch:
        """What is kept of them."""
        found = []
        for name, packing in zip(("down", "up"), self.shape.branch, strict=True):
            if self.shape.branch_bits == 16:
                found.append(self.get_buffer(name).float())
            else:
                parts = (self.get_buffer(f"{name}_codes"), self.get_buffer(f"{name}_scales"))
                found.append(unpack(*parts, packing))
        return found[0], found[1].t()

    def residual(self) -> Float[Tensor, "out in"]:
        """What is kept of the residual."""
        return unpack(self.codes, self.scales, self.shape.packing)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """In the type of `x`."""
        smoothed = (x.float() + self.shift) / self.smooth.float()
        said = functional.linear(self._rounded(smoothed), self.residual(), self.bias)
        if self.shape.rank:
            down, up = self.low_rank_weights()
            said = said + functional.linear(functional.linear(smoothed, down), up)
        return said.to(x.dtype)

    def _rounded(self, smoothed: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        shape = self.shape
        if shape.activation_bits is None:
            return smoothed
        return fake_quantize_groups(smoothed, shape.activation_bits, shape.packing.group_size, shape.is_unsigned)


def replace_with_svd_linear(model: nn.Module, path: str, settings: Mapping[str, Any]) -> None:
    """Put an empty form in the place of a linear layer; `ValueError` if there is none of that shape."""
    found, shape = model.get_submodule(path), SVDShape.parsed(settings)
    if not isinstance(found, nn.Linear) or tuple(found.weight.shape) != shape.packing.shape:
        raise ValueError(f"{path} of the network is no linear layer of shape {shape.packing.shape}")
    model.set_submodule(path, SVDLinear(shape))
