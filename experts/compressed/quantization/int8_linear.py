"""Linear layers that multiply 8-bit integers; activations are rounded per row at run time.

    y = s_x s_w (round(x / s_x) round(w / s_w)^T) + b,   s = max |.| / 127 over a row of x, or of w

Dettmers et al. 2022, arXiv:2208.07339, section 2.1, vector-wise quantization. One scale for the whole batch would be
cheaper, but then an image would depend on the others in its batch.

On a CPU oneDNN multiplies. Without VNNI instructions (AVX512-VNNI, AVX-VNNI) oneDNN adds pairs of products in 16 bits,
which overflow silently. On such a CPU the same integers are multiplied in float32: correct, but not faster.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from ddm_core.json_values import from_json
from experts.compressed.quantization.packing import Packing, empty_codes_and_scales, pack, unpack

LARGEST = 127
SHIFT = 128
"""Zero point: the kernel takes unsigned activations."""
ROW_BLOCK = 128
"""Rows that are rounded at once, few enough to fit the CPU cache."""
PROBE_SIZE = 64
"""Rows, inputs and outputs of the product that tests whether the kernel is correct."""
NO_INT8_INSTRUCTIONS = (
    "this CPU has no 8-bit instructions (VNNI): layers of quantize=int8_dynamic compute the same numbers in float32, "
    "so they are not faster"
)


class Int8Linear(nn.Module):
    """Replaces a `torch.nn.Linear`; its weight is stored packed, in as few bits as `packing` has."""

    KIND: ClassVar[str] = "int8_linear"
    codes: UInt8[Tensor, "out byte"]
    scales: Float[Tensor, "out group"]
    bias: Float[Tensor, " out"] | None

    def __init__(self, packing: Packing, has_bias: bool) -> None:
        """Allocate zeros in the shapes of `packing`."""
        super().__init__()
        self.packing = packing
        self.out_features, self.in_features = packing.shape
        codes, scales = empty_codes_and_scales(packing)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", torch.zeros(self.out_features) if has_bias else None)
        self._cached_weight: tuple[int, Int8Weight] | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, packing: Packing) -> "Int8Linear":
        """Return the rounded layer."""
        layer = cls(packing, linear.bias is not None)
        for buffer, packed in zip((layer.codes, layer.scales), pack(linear.weight, packing), strict=True):
            buffer.copy_(packed)
        if layer.bias is not None:
            layer.bias.copy_(linear.bias.detach())
        return layer

    def settings(self) -> dict[str, Any]:
        """Return its packing, and whether it has a bias, as JSON."""
        return {"packing": asdict(self.packing), "has_bias": self.bias is not None}

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the layer's output in the dtype of `x`."""
        rows = x.reshape(-1, self.in_features).float()
        scales = torch.maximum(rows.amax(-1), rows.amin(-1).neg_()).clamp_min_(1e-12).div_(LARGEST).unsqueeze(1)
        multiply = self._multiply_on_cpu if rows.device.type == "cpu" else self._multiply_on_gpu
        output = multiply(rows, scales).mul_(scales)
        if self.bias is not None:
            output += self.bias
        return output.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _multiply_on_cpu(
        self, rows: Float[Tensor, "row in"], scales: Float[Tensor, "row 1"]
    ) -> Float[Tensor, "row out"]:
        """Multiply with oneDNN, or in float32 on a CPU without 8-bit instructions."""
        weight = self._weight()
        if not weight.is_prepacked:
            codes = (rows / scales).add_(SHIFT + 0.5).floor_().sub_(SHIFT)
            return (codes @ weight.prepacked).mul_(weight.scales)
        if torch.compiler.is_compiling():
            codes = (rows / scales + (SHIFT + 0.5)).to(torch.uint8)
        else:
            codes = torch.empty(rows.shape, dtype=torch.uint8)
            for start in range(0, len(rows), ROW_BLOCK):
                block = slice(start, start + ROW_BLOCK)
                codes[block] = (rows[block] / scales[block]).add_(SHIFT + 0.5)
        product: Tensor = multiply_int8(codes, weight.prepacked, weight.scales, weight.zeros)
        return product

    def _multiply_on_gpu(
        self, rows: Float[Tensor, "row in"], scales: Float[Tensor, "row 1"]
    ) -> Float[Tensor, "row out"]:
        weight = self._weight()
        return torch._int_mm((rows / scales).round_().to(torch.int8), weight.prepacked).float() * weight.scales

    def _weight(self) -> "Int8Weight":
        """Return the 8-bit weight with one scale a row, rebuilt if codes or scales changed; not under compilation."""
        if torch.compiler.is_compiling() and self._cached_weight is not None:
            return self._cached_weight[1]
        version = self.codes._version + self.scales._version
        if (
            self._cached_weight is None
            or self._cached_weight[0] != version
            or self._cached_weight[1].scales.device != self.codes.device
        ):
            self._cached_weight = version, Int8Weight.from_weight(unpack(self.codes, self.scales, self.packing))
        return self._cached_weight[1]

    def prepare(self) -> None:
        """Build the 8-bit weight, before the network is compiled."""
        self._weight()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the 8-bit weight, which is rebuilt."""
        return {**self.__dict__, "_cached_weight": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Weight:
    """The weight in the layout of the multiplication."""

    scales: Float[Tensor, " out"]
    prepacked: Tensor
    """The codes, transposed: on a CPU in oneDNN's layout, or in float32; on a GPU in 8 bits."""
    zeros: Int64[Tensor, " out"]
    is_prepacked: bool
    """Whether it has oneDNN's layout."""

    @classmethod
    def from_weight(cls, weight: Float[Tensor, "out in"]) -> "Int8Weight":
        """Quantize a weight with one scale a row, which preserves the row's largest entry."""
        scales = weight.abs().amax(1).clamp_min(1e-12) / LARGEST
        codes = (weight / scales.unsqueeze(1)).round().to(torch.int8)
        on_cpu = weight.device.type == "cpu"
        is_prepacked = on_cpu and computes_in_int8()
        if is_prepacked:
            prepacked = torch.ops.onednn.qlinear_prepack(codes, None)
        else:
            prepacked = codes.t().float() if on_cpu else codes.t()
        zeros = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
        return cls(scales=scales, prepacked=prepacked, zeros=zeros, is_prepacked=is_prepacked)


@cache
def computes_in_int8() -> bool:
    """Return whether this CPU's 8-bit kernel sums the largest products without overflow."""
    codes = torch.full((PROBE_SIZE, PROBE_SIZE), LARGEST, dtype=torch.int8)
    ones, zeros = torch.ones(PROBE_SIZE), torch.zeros(PROBE_SIZE, dtype=torch.int64)
    largest = torch.full((PROBE_SIZE, PROBE_SIZE), LARGEST + SHIFT, dtype=torch.uint8)
    product = multiply_int8(largest, torch.ops.onednn.qlinear_prepack(codes, None), ones, zeros)
    return bool((product == LARGEST * LARGEST * PROBE_SIZE).all())


@torch.library.custom_op("ddm::multiply_int8", mutates_args=())
def multiply_int8(codes: Tensor, prepacked: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Return (codes - SHIFT) prepacked scales, for [row, in], [in, out], [out] and [out], as [row, out].

    A custom operator, because `torch.compile` rewrites calls of oneDNN's operator.
    """
    product: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, SHIFT, prepacked, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


@multiply_int8.register_fake
def _shape(codes: Tensor, prepacked: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return codes.new_empty((len(codes), len(scales)), dtype=torch.float32)


def replace_with_int8_linear(model: nn.Module, path: str, settings: Mapping[str, Any]) -> None:
    """Replace a linear layer by an empty `Int8Linear`; raise `ValueError` if there is none of that shape."""
    layer, packing = model.get_submodule(path), from_json(Packing, settings["packing"])
    if not isinstance(layer, nn.Linear) or tuple(layer.weight.shape) != packing.shape:
        raise ValueError(f"{path} of the network is no linear layer of shape {packing.shape}")
    model.set_submodule(path, Int8Linear(packing, bool(settings["has_bias"])))


@register_flop_formula(torch.ops.ddm.multiply_int8)
def _flops(codes: tuple[int, int], *rest: Any, out_shape: tuple[int, int], **_: Any) -> int:
    """Return the FLOPs of `multiply_int8`; a multiply-add counts as two."""
    return 2 * codes[0] * codes[1] * out_shape[1]
