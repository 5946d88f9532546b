"""Shared base: store each large weight of K experts as one common base plus K small differences.

    W_k ~ B + D_k,    min over B, D_k of sum_k |W_k - B - D_k|^2

The base is a mean over the experts, weight by weight. It is only useful for experts of one initialization: networks
from different ones have no corresponding neurons. `distance` in the details measures how far the experts differ.
Related: BitDelta (Liu et al. 2024, arXiv:2402.10193), which stores fine-tuned models as one base and 1-bit differences.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddm_core.artifacts import Preempted, Workspace
from ensemble.compression.method import CompressionContext, EnsembleResult, StageError
from ensemble.compression.quantization.config import LearngenesConfig, SharedBaseConfig
from ensemble.compression.quantization.weight_only import large_weights
from experts.compressed.quantization.shared_weight import (
    DELTA,
    FULL,
    LEFT,
    RIGHT,
    MatrixFormat,
    SharedBase,
    SharedWeight,
    SharedWeightConfig,
    StoredMatrix,
    share_weight,
)
from experts.expert import Expert

Stack = Float[Tensor, "expert row column"]
Matrix = Float[Tensor, "row column"]


def quantize_shared_base(config: SharedBaseConfig, context: CompressionContext) -> EnsembleResult:
    """Run `share_base` on all experts of an ensemble."""
    return share_base(context.load_single_networks("shared_base"), config, context.workspace)


def share_base(experts: Mapping[int, Expert], config: SharedBaseConfig, workspace: Workspace) -> EnsembleResult:
    """Replace the large weights of all experts by a shared base and differences.

    Raises `StageError` for fewer than two experts, or without a large weight that all have in the same shape.
    """
    ids = sorted(experts)
    models = [deepcopy(experts[k].model) for k in ids]
    names = common_weights(models, config)
    bases, report, flops = [], {}, 0.0
    for number, name in enumerate(names):
        workspace.report_progress(number, len(names), unit="weights")
        if workspace.stop_requested():
            raise Preempted(f"stopped after {number} of {len(names)} weights; sharing restarts from the first")
        weights = torch.stack([model.get_parameter(name).detach().float() for model in models])
        base, shared = _share_weight(models, name, weights, config)
        bases.append(base)
        report[name] = measure_weights(weights, shared)
        flops += _estimate_flops(weights.flatten(2), config)
    sizes = {
        "bytes_before": sum(sum(parameter.nbytes for parameter in experts[k].model.parameters()) for k in ids),
        "bytes_shared": sum(base.nbytes for base in bases),
        "bytes_own": sum(sum(tensor.nbytes for tensor in model.state_dict().values()) for model in models),
    }
    return EnsembleResult(
        experts={k: replace(experts[k], model=model) for k, model in zip(ids, models, strict=True)},
        modules=len(names) * len(ids),
        flops=flops,
        details=sizes | {"weights": report},
    )


def common_weights(models: Sequence[nn.Module], config: SharedBaseConfig | LearngenesConfig) -> list[str]:
    """Return the names of large weights that all models have in the same shape; raise `StageError` without one."""
    if len(models) < 2:
        raise StageError(
            f"{config.method} needs two experts or more, not {len(models)}; set quantize to another method"
        )
    shapes = [
        {name: model.get_parameter(name).shape for name in large_weights(model, config.min_elements)}
        for model in models
    ]
    names = [name for name, shape in shapes[0].items() if all(other.get(name) == shape for other in shapes)]
    if not names:
        raise StageError(
            f"{config.method} needs a matrix of at least {config.min_elements} elements that all experts have in the "
            "same shape, and there is none; lower quantize.min_elements, or use experts of one architecture that no "
            "other stage has packed"
        )
    return names


def _share_weight(
    models: Sequence[nn.Module], name: str, weights: Tensor, config: SharedBaseConfig
) -> tuple[SharedBase, list[SharedWeight]]:
    """Replace one weight in all models by the shared base and its difference, in place."""
    stack = weights.flatten(2)
    side = min(stack.shape[1:])
    directions = max(1, round(config.directions * side)) if config.delta == "tailors" else 0
    sharing = SharedWeightConfig(
        delta=config.delta,
        bits=config.bits,
        group_size=config.group_size,
        shape=tuple(weights.shape[1:]),
        rank=0 if config.delta == "packed" else max(1, round(config.rank * side)),
        directions=directions,
    )
    parts = (
        _leading_directions(stack, directions) if directions else {FULL: fit_base(stack, sharing.rank, config.rounds)}
    )
    if FULL in parts:
        parts = {FULL: parts[FULL].reshape(sharing.shape)}
    storage = MatrixFormat(bits=config.base_bits, group_size=config.group_size, shape=sharing.shape)
    stored = {
        part: StoredMatrix.from_matrix(values, storage.with_shape(values.shape)) for part, values in parts.items()
    }
    base, shared = SharedBase(stored), []
    for model, weight in zip(models, stack, strict=True):
        coefficients = _fit_coefficients(weight, base) if directions else None
        remainder = weight - base.weight(weight.device, coefficients).flatten(1)
        delta = {DELTA: remainder.reshape(sharing.shape)} if not sharing.rank else factorize(remainder, sharing.rank)
        shared.append(share_weight(model, name, sharing, base, delta, coefficients))
    return base, shared


def fit_base(stack: Stack, rank: int, rounds: int) -> Matrix:
    """Return the base: the mean, or the best matrix under differences of this rank."""
    # min_{B, L_k: rank(L_k) <= r} sum_k |W_k - B - L_k|^2, alternately over B and the L_k; no iteration raises it.
    base = stack.mean(0)
    for _ in range(rounds - 1 if rank else 0):
        fitted = torch.stack(
            [parts[LEFT].T @ parts[RIGHT] for parts in (factorize(delta, rank) for delta in stack - base)]
        )
        base = (stack - fitted).mean(0)
    return base


def _leading_directions(stack: Stack, count: int) -> dict[str, Tensor]:
    """Return the leading singular directions of the mean, one per row."""
    left, _, right = torch.linalg.svd(stack.mean(0).double(), full_matrices=False)
    return {LEFT: left[:, :count].T.float(), RIGHT: right[:count].float()}


def _fit_coefficients(weight: Matrix, base: SharedBase) -> Float[Tensor, " direction"]:
    """Return the expert's coefficients on the stored shared directions, by least squares."""
    # min_s |W - U^T diag(s) V|^2:  (U U^T * V V^T) s = diag(U W V^T)
    left, right = (base.parts[part]().double() for part in (LEFT, RIGHT))
    gram = (left @ left.T) * (right @ right.T)
    target = ((left @ weight.double()) * right).sum(1)
    solution: Tensor = torch.linalg.lstsq(gram, target.unsqueeze(1)).solution
    return solution.squeeze(1).float()


def factorize(matrix: Matrix, rank: int) -> dict[str, Tensor]:
    """Return two matrices, one direction per row, with the closest product of this rank (Eckart & Young 1936)."""
    is_wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix.double() if is_wide else matrix.double().T
    _, vectors = torch.linalg.eigh(short @ short.T)
    leading = vectors[:, -rank:].flip(1).T
    product = leading @ short
    # Equal lengths on both sides: neither overflows in 16 bits.
    lengths = torch.linalg.vector_norm(product, dim=1, keepdim=True).sqrt()
    divisors = torch.where(lengths > 0, lengths, 1.0)
    halves = ((leading * lengths).float(), (product / divisors).float())
    return dict(zip((LEFT, RIGHT) if is_wide else (RIGHT, LEFT), halves, strict=True))


def measure_weights(weights: Tensor, shared: Sequence[SharedWeight]) -> dict[str, float]:
    """Return the distance of the experts from their mean, and from their stored form, relative to their norm."""
    norm = torch.linalg.vector_norm(weights)
    stored = torch.stack([weight(weights) for weight in shared])
    return {
        "distance": float(torch.linalg.vector_norm(weights - weights.mean(0)) / norm),
        "error": float(torch.linalg.vector_norm(weights - stored) / norm),
    }


def _estimate_flops(stack: Stack, config: SharedBaseConfig) -> float:
    """Estimate the FLOPs of one weight: a Gram matrix and its eigenvectors for each expert and round."""
    if config.delta == "packed":
        return 0.0
    short, long = sorted(stack.shape[1:])
    return len(stack) * config.rounds * (2.0 * short**2 * long + 9.0 * short**3)
