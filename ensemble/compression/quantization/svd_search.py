"""One layer's smoothing, low-rank branch and residual: searched so that the layer says what it said before.

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

LEAST_LARGEST = 1e-5
"""No largest entry counts as smaller."""
SMOOTHEST = 1e4
"""No input is divided or multiplied by more, so that sixteen bits hold it."""
SLIGHTLY = 0.25
"""Inputs that reach below zero by less than this share of how far they reach above are shifted to be positive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A weight as branch and residual, for one smoothing."""

    alpha: float | None
    """Strength of the smoothing; None is none."""
    smooth: Float[Tensor, " in"]
    down: Float[Tensor, "rank in"]
    up: Float[Tensor, "out rank"]
    residual: Weight
    """Before it is rounded."""
    error: float
    """|| what the layer says - what it said || / || what it said ||, the bias left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """A finished layer, and how it was found."""

    layer: SVDLinear
    alpha: float | None
    errors: tuple[float, ...]
    """Of the best smoothing, then after every turn of refinement that was better."""


def search(linear: nn.Linear, inputs: Inputs, config: SVDQuantConfig) -> SearchResult:
    """The best layer of few bits on these inputs; its error never grows with smoothing or refinement allowed."""
    problem = Problem(linear.weight.detach().float(), inputs.float(), config)
    best = min(problem.starts(), key=lambda split: split.error)
    errors, idle, split = [best.error], 0, best
    for _ in range(config.refine if problem.rank else 0):
        split = problem.refined(split)
        idle = idle + 1 if split.error >= best.error else 0
        if not idle:
            best = split
            errors.append(best.error)
        elif idle == config.patience:
            break
    return SearchResult(layer=problem.layer(best, linear.bias), alpha=best.alpha, errors=tuple(errors))


class Problem:
    """One weight, and the inputs on which it has to say the same in few bits."""

    def __init__(self, weight: Weight, inputs: Inputs, config: SVDQuantConfig) -> None:
        self.weight, self.config = weight, config
        low, high = float(inputs.amin()), float(inputs.amax())
        # GELU's outputs are never below -0.17: shifted, they need no sign (section 4.2); the bias takes it back.
        self.is_unsigned = config.activation_bits is not None and -SLIGHTLY * high <= low < high
        self.shift = max(-low, 0.0) if self.is_unsigned else 0.0
        self.inputs = inputs + self.shift
        self.said = functional.linear(self.inputs, weight)
        self.size = float(self.said.norm())
        self.rank = min(config.rank, int(min(weight.shape) * config.rank_share)) if config.rank else 0
        self.packing = Packing(
            bits=config.bits, group_size=config.group_size, shape=tuple(weight.shape), scaling=config.scaling
        )

    def shape(self, *, has_bias: bool) -> SVDShape:
        """What its layer is made from."""
        return SVDShape(
            packing=self.packing,
            rank=self.rank,
            branch_bits=self.config.branch_bits if self.rank else 16,
            activation_bits=self.config.activation_bits,
            is_unsigned=self.is_unsigned,
            has_bias=has_bias,
        )

    def starts(self) -> Iterator[Split]:
        """Without smoothing, and with every strength of it."""
        yield self._started(None)
        for number in range(self.config.grid if self.config.smooth else 0):
            yield self._started(number / self.config.grid)

    def refined(self, split: Split) -> Split:
        """The branch fitted to what the rounded residual leaves over, and the residual to that branch."""
        # L <- SVD_r(W^ - Q(R)), R <- W^ - L: section 4.3.
        left = self._smoothed(split.smooth) - self._rounded(split.residual)
        return self._split(split.alpha, split.smooth, left)

    def layer(self, split: Split, bias: Tensor | None) -> SVDLinear:
        """The layer that keeps a split."""
        has_bias = bias is not None or self.shift != 0
        made = SVDLinear(self.shape(has_bias=has_bias)).to(self.weight.device)
        made.smooth.copy_(split.smooth)
        made.set_low_rank(split.down, split.up)
        made.shift.fill_(self.shift)
        made.set_residual(split.residual)
        if made.bias is not None:
            kept = 0 if bias is None else bias.detach()
            made.bias.copy_(kept - self.shift * self.weight.sum(1))
        return made

    def _started(self, alpha: float | None) -> Split:
        smooth = torch.ones_like(self.inputs[0]) if alpha is None else self._smoothing(alpha)
        return self._split(alpha, smooth, self._smoothed(smooth))

    def _smoothing(self, alpha: float) -> Float[Tensor, " in"]:
        # lambda = max |X|^alpha / max |W|^(1 - alpha) for every input, section 4.1; Xiao et al. 2023 (SmoothQuant,
        # arXiv:2211.10438, equation 4). A common factor changes nothing, so their geometric mean is made 1.
        x = self.inputs.abs().amax(0).clamp_min(LEAST_LARGEST).log()
        w = self.weight.abs().amax(0).clamp_min(LEAST_LARGEST).log()
        logarithm = alpha * x - (1 - alpha) * w
        smooth = (logarithm - logarithm.mean()).exp().clamp(1 / SMOOTHEST, SMOOTHEST)
        return smooth.to(torch.float16).float()

    def _smoothed(self, smooth: Float[Tensor, " in"]) -> Weight:
        return self.weight * smooth

    def _split(self, alpha: float | None, smooth: Float[Tensor, " in"], target: Weight) -> Split:
        """The branch that is closest to `target`, and its residual, to which the branch's own rounding falls."""
        up, down = low_rank(target, self.rank)
        down, up = rounded_branch(down, up, self.shape(has_bias=False))
        residual = self._smoothed(smooth) - up @ down
        error = self._error(smooth, up, down, residual)
        return Split(alpha=alpha, smooth=smooth, down=down, up=up, residual=residual, error=error)

    def _error(self, smooth: Tensor, up: Tensor, down: Tensor, residual: Weight) -> float:
        inputs, rounded = self.inputs / smooth, self._rounded(residual)
        bits, few = self.config.activation_bits, self.inputs / smooth
        if bits is not None:
            few = fake_quantize_groups(inputs, bits, self.config.group_size, self.is_unsigned)
        said = functional.linear(few, rounded) + functional.linear(functional.linear(inputs, down), up)
        return float((said - self.said).norm()) / max(self.size, 1e-30)

    def _rounded(self, residual: Weight) -> Weight:
        return unpack(*pack(residual, self.packing), self.packing)


def low_rank(weight: Weight, rank: int) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """The factors of the matrix of this rank that is closest to a weight: U of its SVD, and U^T weight."""
    if weight.shape[0] > weight.shape[1]:
        right, left = low_rank(weight.t(), rank)
        return left.t(), right.t()
    exact = weight.double()
    directions = torch.linalg.eigh(exact @ exact.t()).eigenvectors[:, weight.shape[0] - rank :]
    return directions.float(), (directions.t() @ exact).float()
