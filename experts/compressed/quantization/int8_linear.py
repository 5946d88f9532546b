"""A linear layer that multiplies whole numbers of eight bits: activations are rounded row by row as they come.

    y = s_x s_w (round(x / s_x) round(w / s_w)^T) + b,   s = max |.| / 127 over a row of x, or of w

Dettmers et al. 2022, arXiv:2208.07339, section 2.1, vector-wise quantization. Scales that span the whole batch would be
cheaper, but then an image would depend on what it is sampled beside.

On a CPU oneDNN multiplies. Where the processor has no instructions for it (AVX512-VNNI, AVX-VNNI), oneDNN adds pairs of
products in sixteen bits, which overflow without a word; there the same whole numbers are multiplied in float32, which
is right and no quicker than the layer was.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from experts.compressed.quantization.packing import Packing, empty_parts, pack, unpack

LARGEST = 127
SHIFT = 128
"""The kernel takes unsigned activations, so zero is moved to here."""
ROWS = 128
"""Rows that are rounded at once, few enough to stay in the processor's cache."""
PROBED = 64
"""Rows, inputs and outputs of the product that shows whether the kernel is right."""
NO_INSTRUCTIONS = (
    "this processor has no instructions for eight bits (VNNI): layers of quantize=int8_dynamic give the same numbers "
    "here in float32, and are no quicker"
)


class Int8Linear(nn.Module):
    """Takes the place of a `torch.nn.Linear`; its weight is stored in as few bits as its packing says."""

    KIND: ClassVar[str] = "int8_linear"
    codes: UInt8[Tensor, "out byte"]
    scales: Float[Tensor, "out group"]
    bias: Float[Tensor, " out"] | None

    def __init__(self, packing: Packing, has_bias: bool) -> None:
        """Empty, in the shapes of `packing`."""
        super().__init__()
        self.packing = packing
        self.out_features, self.in_features = packing.shape
        codes, scales = empty_parts(packing)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", torch.zeros(self.out_features) if has_bias else None)
        self._ready: tuple[int, Int8Weight] | None = None

    @classmethod
    def of(cls, linear: nn.Linear, packing: Packing) -> "Int8Linear":
        """The rounded layer."""
        made = cls(packing, linear.bias is not None)
        for kept, found in zip((made.codes, made.scales), pack(linear.weight, packing), strict=True):
            kept.copy_(found)
        if made.bias is not None:
            made.bias.copy_(linear.bias.detach())
        return made

    def settings(self) -> dict[str, Any]:
        """Its packing, and whether it has a bias."""
        return {"packing": asdict(self.packing), "has_bias": self.bias is not None}

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """In the type of `x`."""
        rows = x.reshape(-1, self.in_features).float()
        scales = torch.maximum(rows.amax(-1), rows.amin(-1).neg_()).clamp_min_(1e-12).div_(LARGEST).unsqueeze(1)
        multiply = self._on_cpu if rows.device.type == "cpu" else self._elsewhere
        said = multiply(rows, scales).mul_(scales)
        if self.bias is not None:
            said += self.bias
        return said.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _on_cpu(self, rows: Float[Tensor, "row in"], scales: Float[Tensor, "row 1"]) -> Float[Tensor, "row out"]:
        """By oneDNN, where the processor has instructions for eight bits."""
        weight = self._weight()
        if not weight.is_prepacked:
            codes = (rows / scales).add_(SHIFT + 0.5).floor_().sub_(SHIFT)
            return (codes @ weight.prepacked).mul_(weight.scales)
        if torch.compiler.is_compiling():
            codes = (rows / scales + (SHIFT + 0.5)).to(torch.uint8)
        else:
            codes = torch.empty(rows.shape, dtype=torch.uint8)
            for start in range(0, len(rows), ROWS):
                some = slice(start, start + ROWS)
                codes[some] = (rows[some] / scales[some]).add_(SHIFT + 0.5)
        said: Tensor = multiply_int8(codes, weight.prepacked, weight.scales, weight.zeros)
        return said

    def _elsewhere(self, rows: Float[Tensor, "row in"], scales: Float[Tensor, "row 1"]) -> Float[Tensor, "row out"]:
        weight = self._weight()
        return torch._int_mm((rows / scales).round_().to(torch.int8), weight.prepacked).float() * weight.scales

    def _weight(self) -> "Int8Weight":
        """In eight bits with one scale a row, made anew if what is stored has changed; not while it is compiled."""
        if torch.compiler.is_compiling() and self._ready is not None:
            return self._ready[1]
        version = self.codes._version + self.scales._version
        if self._ready is None or self._ready[0] != version or self._ready[1].scales.device != self.codes.device:
            self._ready = version, Int8Weight.of(unpack(self.codes, self.scales, self.packing))
        return self._ready[1]

    def prepare(self) -> None:
        """Make what it multiplies with, before the network is compiled."""
        self._weight()

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made anew."""
        return {**self.__dict__, "_ready": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Weight:
    """What a layer multiplies with."""

    scales: Float[Tensor, " out"]
    prepacked: Tensor
    """The codes, transposed: on a CPU as oneDNN wants them, or in float32; elsewhere in eight bits."""
    zeros: Int64[Tensor, " out"]
    is_prepacked: bool
    """Whether it is laid out for oneDNN."""

    @classmethod
    def of(cls, weight: Float[Tensor, "out in"]) -> "Int8Weight":
        """The largest entry of every row is kept."""
        scales = weight.abs().amax(1).clamp_min(1e-12) / LARGEST
        codes = (weight / scales.unsqueeze(1)).round().to(torch.int8)
        on_cpu = weight.device.type == "cpu"
        is_prepacked = on_cpu and computes_in_int8()
        if is_prepacked:
            laid_out = torch.ops.onednn.qlinear_prepack(codes, None)
        else:
            laid_out = codes.t().float() if on_cpu else codes.t()
        zeros = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
        return cls(scales=scales, prepacked=laid_out, zeros=zeros, is_prepacked=is_prepacked)


@cache
def computes_in_int8() -> bool:
    """Whether this processor's eight-bit kernel gives the sum of the largest products as it is."""
    codes = torch.full((PROBED, PROBED), LARGEST, dtype=torch.int8)
    one, zero = torch.ones(PROBED), torch.zeros(PROBED, dtype=torch.int64)
    largest = torch.full((PROBED, PROBED), LARGEST + SHIFT, dtype=torch.uint8)
    said = multiply_int8(largest, torch.ops.onednn.qlinear_prepack(codes, None), one, zero)
    return bool((said == LARGEST * LARGEST * PROBED).all())


@torch.library.custom_op("ddm::multiply_int8", mutates_args=())
def multiply_int8(codes: Tensor, laid_out: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """(codes - SHIFT) laid_out scales; an operator of our own, since `torch.compile` has its own mind about oneDNN's.

    [row, in], [in, out], [out] and [out] to [row, out].
    """
    said: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, SHIFT, laid_out, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return said


@multiply_int8.register_fake
def _shape(codes: Tensor, laid_out: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return codes.new_empty((len(codes), len(scales)), dtype=torch.float32)


def replace_with_int8_linear(model: nn.Module, path: str, settings: Mapping[str, Any]) -> None:
    """Put an empty form in the place of a linear layer; `ValueError` if there is none of that shape."""
    found, packing = model.get_submodule(path), Packing.parsed(settings["packing"])
    if not isinstance(found, nn.Linear) or tuple(found.weight.shape) != packing.shape:
        raise ValueError(f"{path} of the network is no linear layer of shape {packing.shape}")
    model.set_submodule(path, Int8Linear(packing, bool(settings["has_bias"])))


@register_flop_formula(torch.ops.ddm.multiply_int8)
def _flops(codes: tuple[int, int], *rest: Any, out_shape: tuple[int, int], **_: Any) -> int:
    """A multiply-add counts as two."""
    return 2 * codes[0] * codes[1] * out_shape[1]
