"""SVDQuant linear layers: a residual in few bits plus a low-rank branch in more bits.

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

from ddm_core.json_values import from_json
from experts.compressed.quantization.fake_quant import fake_quantize_groups
from experts.compressed.quantization.packing import Packing, empty_codes_and_scales, pack, unpack


@dataclass(frozen=True, slots=True, kw_only=True)
class SVDShape:
    """Bits, rank and shape from which an empty layer is built."""

    packing: Packing
    """Of the residual R."""
    rank: int
    """Rank of the low-rank branch; 0 is none."""
    branch_bits: Literal[8, 16]
    """Bits of the branch's weights."""
    activation_bits: Literal[4, 8] | None
    """Bits of the residual's input, which is rounded per row in groups of the residual's size; None does not round."""
    is_unsigned: bool
    """Whether the shifted input is never negative, so that no bit is spent on a sign."""
    has_bias: bool

    def __post_init__(self) -> None:
        """Raise `ValueError` unless the residual is a matrix and the rank fits it."""
        if len(self.packing.shape) != 2 or not 0 <= self.rank <= min(self.packing.shape):
            raise ValueError(f"a branch of rank {self.rank} needs a matrix of at least that rank; got {self.packing}")

    @property
    def branch(self) -> tuple[Packing, Packing]:
        """Return the packings of the branch's two weights in 8 bits, the second one transposed."""
        out_features, in_features = self.packing.shape
        sizes = ((self.rank, in_features), (self.rank, out_features))
        down, up = (Packing(bits=8, group_size=BRANCH_GROUP, shape=size, scaling="absmax") for size in sizes)
        return down, up


BRANCH_GROUP = 64
"""Weights of an 8-bit branch that share a scale."""

Branch = tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]


def rounded_branch(down: Float[Tensor, "rank in"], up: Float[Tensor, "out rank"], shape: SVDShape) -> Branch:
    """Return the two weights of the branch after rounding."""
    if shape.branch_bits == 16 or not shape.rank:
        return down.to(torch.float16).float(), up.to(torch.float16).float()
    weights = zip((down, up.t()), shape.branch, strict=True)
    rounded = [unpack(*pack(weight, packing), packing) for weight, packing in weights]
    return rounded[0], rounded[1].t()


class SVDLinear(nn.Module):
    """Replaces a `torch.nn.Linear`."""

    KIND: ClassVar[str] = "svd_linear"
    codes: UInt8[Tensor, "out byte"]
    scales: Float[Tensor, "out group"]
    smooth: Float[Tensor, " in"]
    shift: Float[Tensor, "1"]
    bias: Float[Tensor, " out"] | None

    def __init__(self, shape: SVDShape) -> None:
        """Allocate zeros; the layer then returns zeros."""
        super().__init__()
        self.shape = shape
        self.out_features, self.in_features = shape.packing.shape
        codes, scales = empty_codes_and_scales(shape.packing)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("smooth", torch.ones(self.in_features, dtype=torch.float16))
        self.register_buffer("shift", torch.zeros(1))
        for name, packing in zip(("down", "up"), shape.branch, strict=True):
            if shape.branch_bits == 16:
                self.register_buffer(name, torch.zeros(packing.shape, dtype=torch.float16))
            else:
                for part, empty in zip(("codes", "scales"), empty_codes_and_scales(packing), strict=True):
                    self.register_buffer(f"{name}_{part}", empty)
        self.register_buffer("bias", torch.zeros(self.out_features) if shape.has_bias else None)

    def settings(self) -> dict[str, Any]:
        """Return its shape as JSON."""
        return asdict(self.shape)

    def set_residual(self, residual: Float[Tensor, "out in"]) -> None:
        """Pack and store the residual."""
        for buffer, packed in zip((self.codes, self.scales), pack(residual, self.shape.packing), strict=True):
            buffer.copy_(packed)

    def set_low_rank(self, down: Float[Tensor, "rank in"], up: Float[Tensor, "out rank"]) -> None:
        """Store the branch's weights."""
        for name, packing, weight in zip(("down", "up"), self.shape.branch, (down, up.t()), strict=True):
            if self.shape.branch_bits == 16:
                self.get_buffer(name).copy_(weight)
            else:
                for part, packed in zip(("codes", "scales"), pack(weight, packing), strict=True):
                    self.get_buffer(f"{name}_{part}").copy_(packed)

    def low_rank_weights(self) -> Branch:
        """Return the branch's weights as float32."""
        weights = []
        for name, packing in zip(("down", "up"), self.shape.branch, strict=True):
            if self.shape.branch_bits == 16:
                weights.append(self.get_buffer(name).float())
            else:
                parts = (self.get_buffer(f"{name}_codes"), self.get_buffer(f"{name}_scales"))
                weights.append(unpack(*parts, packing))
        return weights[0], weights[1].t()

    def residual(self) -> Float[Tensor, "out in"]:
        """Return the residual as float32."""
        return unpack(self.codes, self.scales, self.shape.packing)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the layer's output in the dtype of `x`."""
        smoothed = (x.float() + self.shift) / self.smooth.float()
        output = functional.linear(self._round_activations(smoothed), self.residual(), self.bias)
        if self.shape.rank:
            down, up = self.low_rank_weights()
            output = output + functional.linear(functional.linear(smoothed, down), up)
        return output.to(x.dtype)

    def _round_activations(self, smoothed: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        shape = self.shape
        if shape.activation_bits is None:
            return smoothed
        return fake_quantize_groups(smoothed, shape.activation_bits, shape.packing.group_size, shape.is_unsigned)


def replace_with_svd_linear(model: nn.Module, path: str, settings: Mapping[str, Any]) -> None:
    """Replace a linear layer by an empty `SVDLinear`; raise `ValueError` if there is none of that shape."""
    layer, shape = model.get_submodule(path), from_json(SVDShape, settings)
    if not isinstance(layer, nn.Linear) or tuple(layer.weight.shape) != shape.packing.shape:
        raise ValueError(f"{path} of the network is no linear layer of shape {shape.packing.shape}")
    model.set_submodule(path, SVDLinear(shape))
