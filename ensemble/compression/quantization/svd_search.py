"""Search of one layer's smoothing, low-rank branch and residual for the least output error.

    min over s, U, D of || x W^T - Q(x / s) Q(R)^T - (x / s) (U D)^T ||,    R = W diag(s) - U D

Li et al. 2025 (SVDQuant), arXiv:2411.05007, sections 4.1 to 4.3.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ensemble.compression.quantization.config import SVDQuantConfig
from experts.compressed.quantization.fake_quant import fake_quantize_groups
from experts.compressed.quantization.packing import Packing, pack, unpack
from experts.compressed.quantization.svd_linear import SVDLinear, SVDShape, rounded_branch

Inputs = Float[Tensor, "token in"]
Weight = Float[Tensor, "out in"]

MIN_MAGNITUDE = 1e-5
"""Lower bound of the largest magnitude of an input or a weight column."""
MAX_SMOOTHING = 1e4
"""Largest factor of the smoothing, in either direction, so that 16 bits can represent it."""
MAX_NEGATIVE_SHARE = 0.25
"""Inputs are shifted to be positive if their minimum is above minus this share of their maximum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A smoothed weight as low-rank branch and residual."""

    alpha: float | None
    """Strength of the smoothing; None disables it."""
    smooth: Float[Tensor, " in"]
    down: Float[Tensor, "rank in"]
    up: Float[Tensor, "out rank"]
    residual: Weight
    """The residual before rounding."""
    error: float
    """|| quantized output - output || / || output ||, without the bias."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """The quantized layer, and the progress of its search."""

    layer: SVDLinear
    alpha: float | None
    errors: tuple[float, ...]
    """Error of the best smoothing, then after every iteration of refinement that lowered it."""


def search(linear: nn.Linear, inputs: Inputs, config: SVDQuantConfig) -> SearchResult:
    """Search the quantized layer of least error on these inputs.

    Smoothing and refinement never raise the error, since both keep the best candidate.
    """
    problem = LayerProblem(linear.weight.detach().float(), inputs.float(), config)
    best = min(problem.smoothed_splits(), key=lambda split: split.error)
    errors, idle, split = [best.error], 0, best
    for _ in range(config.refine if problem.rank else 0):
        split = problem.refine(split)
        idle = idle + 1 if split.error >= best.error else 0
        if not idle:
            best = split
            errors.append(best.error)
        elif idle == config.patience:
            break
    return SearchResult(layer=problem.build_layer(best, linear.bias), alpha=best.alpha, errors=tuple(errors))


class LayerProblem:
    """One weight, and the inputs on which its quantized form should have the same outputs."""

    def __init__(self, weight: Weight, inputs: Inputs, config: SVDQuantConfig) -> None:
        self.weight, self.config = weight, config
        low, high = float(inputs.amin()), float(inputs.amax())
        # GELU's outputs are never below -0.17: shifted, they need no sign (section 4.2); the bias undoes the shift.
        self.is_unsigned = config.activation_bits is not None and -MAX_NEGATIVE_SHARE * high <= low < high
        self.shift = max(-low, 0.0) if self.is_unsigned else 0.0
        self.inputs = inputs + self.shift
        self.output = functional.linear(self.inputs, weight)
        self.output_norm = float(self.output.norm())
        self.rank = min(config.rank, int(min(weight.shape) * config.rank_share)) if config.rank else 0
        self.packing = Packing(
            bits=config.bits, group_size=config.group_size, shape=tuple(weight.shape), scaling=config.scaling
        )

    def shape(self, *, has_bias: bool) -> SVDShape:
        """Return the shape of the quantized layer."""
        return SVDShape(
            packing=self.packing,
            rank=self.rank,
            branch_bits=self.config.branch_bits if self.rank else 16,
            activation_bits=self.config.activation_bits,
            is_unsigned=self.is_unsigned,
            has_bias=has_bias,
        )

    def smoothed_splits(self) -> Iterator[Split]:
        """Yield the split without smoothing, and one for every smoothing strength."""
        yield self._split_smoothed(None)
        for number in range(self.config.grid if self.config.smooth else 0):
            yield self._split_smoothed(number / self.config.grid)

    def refine(self, split: Split) -> Split:
        """Fit the branch to the error of the rounded residual, and the residual to that branch."""
        # L <- SVD_r(W^ - Q(R)), R <- W^ - L: section 4.3.
        target = self._scale_weight(split.smooth) - self._round(split.residual)
        return self._split(split.alpha, split.smooth, target)

    def build_layer(self, split: Split, bias: Tensor | None) -> SVDLinear:
        """Build the quantized layer of a split."""
        has_bias = bias is not None or self.shift != 0
        layer = SVDLinear(self.shape(has_bias=has_bias)).to(self.weight.device)
        layer.smooth.copy_(split.smooth)
        layer.set_low_rank(split.down, split.up)
        layer.shift.fill_(self.shift)
        layer.set_residual(split.residual)
        if layer.bias is not None:
            original_bias = 0 if bias is None else bias.detach()
            layer.bias.copy_(original_bias - self.shift * self.weight.sum(1))
        return layer

    def _split_smoothed(self, alpha: float | None) -> Split:
        smooth = torch.ones_like(self.inputs[0]) if alpha is None else self._smoothing_factors(alpha)
        return self._split(alpha, smooth, self._scale_weight(smooth))

    def _smoothing_factors(self, alpha: float) -> Float[Tensor, " in"]:
        # lambda = max |X|^alpha / max |W|^(1 - alpha) for every input, section 4.1; Xiao et al. 2023 (SmoothQuant,
        # arXiv:2211.10438, equation 4). A common factor changes nothing, so their geometric mean is set to 1.
        x = self.inputs.abs().amax(0).clamp_min(MIN_MAGNITUDE).log()
        w = self.weight.abs().amax(0).clamp_min(MIN_MAGNITUDE).log()
        logarithm = alpha * x - (1 - alpha) * w
        smooth = (logarithm - logarithm.mean()).exp().clamp(1 / MAX_SMOOTHING, MAX_SMOOTHING)
        return smooth.to(torch.float16).float()

    def _scale_weight(self, smooth: Float[Tensor, " in"]) -> Weight:
        return self.weight * smooth

    def _split(self, alpha: float | None, smooth: Float[Tensor, " in"], target: Weight) -> Split:
        """Return the branch closest to `target`, and its residual, which absorbs the rounding error of the branch."""
        up, down = low_rank(target, self.rank)
        down, up = rounded_branch(down, up, self.shape(has_bias=False))
        residual = self._scale_weight(smooth) - up @ down
        error = self._measure_error(smooth, up, down, residual)
        return Split(alpha=alpha, smooth=smooth, down=down, up=up, residual=residual, error=error)

    def _measure_error(self, smooth: Tensor, up: Tensor, down: Tensor, residual: Weight) -> float:
        inputs, rounded = self.inputs / smooth, self._round(residual)
        bits, quantized_inputs = self.config.activation_bits, inputs
        if bits is not None:
            quantized_inputs = fake_quantize_groups(inputs, bits, self.config.group_size, self.is_unsigned)
        output = functional.linear(quantized_inputs, rounded) + functional.linear(functional.linear(inputs, down), up)
        return float((output - self.output).norm()) / max(self.output_norm, 1e-30)

    def _round(self, residual: Weight) -> Weight:
        return unpack(*pack(residual, self.packing), self.packing)


def low_rank(weight: Weight, rank: int) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Return the factors of the closest matrix of this rank to a weight: U of its SVD, and U^T weight."""
    if weight.shape[0] > weight.shape[1]:
        right, left = low_rank(weight.t(), rank)
        return left.t(), right.t()
    exact = weight.double()
    directions = torch.linalg.eigh(exact @ exact.t()).eigenvectors[:, weight.shape[0] - rank :]
    return directions.float(), (directions.t() @ exact).float()
