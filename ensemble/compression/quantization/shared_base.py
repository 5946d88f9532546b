"""All experts as one base and K differences: what K networks of one start have in common is stored once.

The base is a mean over the experts, weight by weight, so nothing but their start may bring them together: experts that
were trained from scratch have no neuron in the same place. `distance` in the details says how far apart they are.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddm_core.artifacts import Preempted, Workspace
from ensemble.compression.method import CompressionContext, EnsembleResult, StageError
from ensemble.compression.quantization.config import SharedBaseConfig
from ensemble.compression.quantization.weight_only import large_weights
from experts.compressed.quantization.shared_weight import (
    LEFT,
    OWN,
    RIGHT,
    WHOLE,
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


def quantize_shared_base(config: SharedBaseConfig, given: CompressionContext) -> EnsembleResult:
    """What `share` makes of all experts of an ensemble."""
    return share_base(given.experts("shared_base"), config, given.workspace)


def share_base(experts: Mapping[int, Expert], config: SharedBaseConfig, workspace: Workspace) -> EnsembleResult:
    """The same experts with their large weights shared.

    Raises `StageError` for fewer than two experts, or without a large weight that all have in the same shape.
    """
    ids = sorted(experts)
    models = [deepcopy(experts[k].model) for k in ids]
    names = _common(models, config)
    bases, report, flops = [], {}, 0.0
    for number, name in enumerate(names):
        workspace.report_progress(number, len(names), unit="weights")
        if workspace.stop_requested():
            raise Preempted(f"stopped after {number} of {len(names)} weights were shared; sharing begins again")
        weights = torch.stack([model.get_parameter(name).detach().float() for model in models])
        base, forms = _shared(models, name, weights, config)
        bases.append(base)
        report[name] = _report(weights, forms)
        flops += _flops(weights.flatten(2), config)
    sizes = {
        "bytes_before": sum(sum(parameter.nbytes for parameter in experts[k].model.parameters()) for k in ids),
        "bytes_shared": sum(base.nbytes for base in bases),
        "bytes_own": sum(sum(tensor.nbytes for tensor in model.state_dict().values()) for model in models),
    }
    made = {k: replace(experts[k], model=model) for k, model in zip(ids, models, strict=True)}
    return EnsembleResult(experts=made, modules=len(names) * len(ids), flops=flops, details=sizes | {"weights": report})


def _common(models: Sequence[nn.Module], config: SharedBaseConfig) -> list[str]:
    """Large weights that all models have in the same shape."""
    if len(models) < 2:
        raise StageError(f"share needs two experts or more to have something in common, not {len(models)}")
    shapes = [
        {name: model.get_parameter(name).shape for name in large_weights(model, config.min_elements)}
        for model in models
    ]
    found = [name for name, shape in shapes[0].items() if all(other.get(name) == shape for other in shapes)]
    if not found:
        raise StageError(
            f"share found no matrix of at least {config.min_elements} entries that all experts have in the same shape: lower "
            "share.least, or take experts of one architecture that no other stage has packed"
        )
    return found


def _shared(
    models: Sequence[nn.Module], name: str, weights: Tensor, config: SharedBaseConfig
) -> tuple[SharedBase, list[SharedWeight]]:
    """Put the shared form of one weight into all models."""
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
    parts = _directions(stack, directions) if directions else {WHOLE: _middle(stack, sharing.rank, config.rounds)}
    if WHOLE in parts:
        parts = {WHOLE: parts[WHOLE].reshape(sharing.shape)}
    storage = MatrixFormat(bits=config.base_bits, group_size=config.group_size, shape=sharing.shape)
    held = {part: StoredMatrix.from_matrix(values, storage.of(values.shape)) for part, values in parts.items()}
    base, forms = SharedBase(held), []
    for model, weight in zip(models, stack, strict=True):
        coefficients = _coefficients(weight, base) if directions else None
        rest = weight - base.weight(weight.device, coefficients).flatten(1)
        own = {OWN: rest.reshape(sharing.shape)} if not sharing.rank else _thin(rest, sharing.rank)
        forms.append(share_weight(model, name, sharing, base, own, coefficients))
    return base, forms


def _middle(stack: Stack, rank: int, rounds: int) -> Matrix:
    """The base: the mean, or what is best under differences of this rank."""
    # min_{B, L_k: rank(L_k) <= r} sum_k |W_k - B - L_k|^2, over B and the L_k in turn; no turn makes it larger.
    base = stack.mean(0)
    for _ in range(rounds - 1 if rank else 0):
        fitted = torch.stack([parts[LEFT].T @ parts[RIGHT] for parts in (_thin(rest, rank) for rest in stack - base)])
        base = (stack - fitted).mean(0)
    return base


def _directions(stack: Stack, count: int) -> dict[str, Tensor]:
    """The mean's leading singular directions, one a row."""
    left, _, right = torch.linalg.svd(stack.mean(0).double(), full_matrices=False)
    return {LEFT: left[:, :count].T.float(), RIGHT: right[:count].float()}


def _coefficients(weight: Matrix, base: SharedBase) -> Float[Tensor, " direction"]:
    """The expert's own coefficients on the shared directions as they are stored, by least squares."""
    # min_s |W - U^T diag(s) V|^2:  (U U^T * V V^T) s = diag(U W V^T)
    left, right = (base.parts[part]().double() for part in (LEFT, RIGHT))
    gram = (left @ left.T) * (right @ right.T)
    wanted = ((left @ weight.double()) * right).sum(1)
    solved: Tensor = torch.linalg.lstsq(gram, wanted.unsqueeze(1)).solution
    return solved.squeeze(1).float()


def _thin(matrix: Matrix, rank: int) -> dict[str, Tensor]:
    """The two thin matrices, one direction a row, whose product is the nearest of this rank (Eckart & Young 1936)."""
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


def _report(weights: Tensor, forms: Sequence[SharedWeight]) -> dict[str, float]:
    """How far the experts are from their mean, and from what is stored, as shares of their own length."""
    length = torch.linalg.vector_norm(weights)
    again = torch.stack([form(weights) for form in forms])
    return {
        "distance": float(torch.linalg.vector_norm(weights - weights.mean(0)) / length),
        "error": float(torch.linalg.vector_norm(weights - again) / length),
    }


def _flops(stack: Stack, config: SharedBaseConfig) -> float:
    """About what taking one weight apart costs: a Gram matrix and its eigenvectors for each expert and round."""
    if config.delta == "packed":
        return 0.0
    short, long = sorted(stack.shape[1:])
    return len(stack) * config.rounds * (2.0 * short**2 * long + 9.0 * short**3)
