"""Learngenes: weights of K experts as a base and rank-one tailors that all share, and gates of each on the tailors.

    W_k ~ B + sum_j g_kj u_j v_j^T,   min over B, u, v and g of sum_k |W_k - B - U^T diag(g_k) V|^2

After DivControl (Xie et al. 2025, arXiv:2507.23620), which divides the singular components of a weight into learngenes,
always on, and tailors with a gate for each condition. Here the conditions are experts: the base has the learngenes, and
singular components of the experts' differences start as tailors, each with the gate of its own expert alone. That is a
difference of low rank; as soon as gates are free, experts use each other's tailors. A training on the experts' outputs
follows, with an alignment of their early features.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from ddm_core.artifacts import Preempted, Workspace
from ensemble.compression.common.calibration_data import HELD_OUT, at_few_step_times, record_calls, run_network
from ensemble.compression.method import CompressionContext, EnsembleResult, StageError
from ensemble.compression.quantization.config import LearngenesConfig
from ensemble.compression.quantization.shared_base import Stack, common_weights, factorize, fit_base, measure_weights
from experts.compressed.quantization.shared_weight import (
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
from experts.config import TrainingConfig
from experts.expert import Expert, network_flops
from experts.networks.adapters.registry import ADAPTERS
from experts.networks.model_io import move_model
from experts.networks.registry import block_paths
from experts.training.flops import training_flops
from experts.training.latent_dataset import Batch, LatentDataset, make_batch
from experts.training.trainer import check_device, fit

Gates = Float[Tensor, "expert tailor"]
GATE_BITS = 32
MEASURED_BATCHES = 8
START_ROUNDS = 3
"""Rounds of the low-rank fit from which tailors start."""
RIDGE = 1e-9
"""Added to the diagonal of normal equations, relative to its mean."""


def quantize_learngenes(config: LearngenesConfig, context: CompressionContext) -> EnsembleResult:
    """Run `share_learngenes` on all experts of an ensemble."""
    experts = context.load_single_networks(config.method)
    data = None if config.training is None else context.data.load_all_latents(context.workspace)
    return share_learngenes(experts, data, config, context.workspace)


def share_learngenes(
    experts: Mapping[int, Expert], data: LatentDataset | None, config: LearngenesConfig, workspace: Workspace
) -> EnsembleResult:
    """Replace the large weights of all experts by base, tailors and gates, trained on the latents of all clusters.

    Raises `StageError` for fewer than two experts, without a large weight that all have in the same shape, and for an
    alignment without blocks; `Preempted` between two weights or steps.
    """
    ids = sorted(experts)
    models = [deepcopy(experts[k].model) for k in ids]
    names, fitted = common_weights(models, config), dict[str, Tailors]()
    for number, name in enumerate(names):
        workspace.report_progress(number, len(names), unit="weights")
        if workspace.stop_requested():
            raise Preempted(f"stopped after {number} of {len(names)} weights; the fit restarts from the first")
        weights = torch.stack([model.get_parameter(name).detach().float() for model in models])
        fitted[name] = fit_tailors(weights, config)
    flops, errors = 0.0, dict[str, float]()
    if config.training is not None and data is not None:
        flops, errors = _train(fitted, experts, data, config, config.training, workspace)
    bases, report = [], {}
    for name, tailors in fitted.items():
        weights = torch.stack([model.get_parameter(name).detach().float() for model in models])
        base, shared = _store(models, name, weights, tailors, config)
        bases.append(base)
        report[name] = measure_weights(weights, shared)
    sizes = {
        "bytes_before": sum(sum(parameter.nbytes for parameter in experts[k].model.parameters()) for k in ids),
        "bytes_shared": sum(base.nbytes for base in bases),
        "bytes_own": sum(sum(tensor.nbytes for tensor in model.state_dict().values()) for model in models),
    }
    return EnsembleResult(
        experts={k: replace(experts[k], model=model) for k, model in zip(ids, models, strict=True)},
        modules=len(names) * len(ids),
        flops=flops,
        details=sizes | {"weights": report} | errors,
    )


class Tailors(nn.Module):
    """Base and tailors of one weight, as parameters, and the gates of every expert."""

    def __init__(self, base: Tensor, left: Tensor, right: Tensor, gates: Gates, *, learn_gates: bool) -> None:
        """Take a base in the shape of the weight, and one direction a row."""
        super().__init__()
        self.base, self.left, self.right = (nn.Parameter(part) for part in (base, left, right))
        self.gates = nn.Parameter(gates, requires_grad=learn_gates)

    def weight(self, place: int) -> Tensor:
        """Return the weight of an expert, by its place among all."""
        combined: Tensor = (self.left * self.gates[place, :, None]).T @ self.right
        return self.base + combined.reshape(self.base.shape)


def fit_tailors(weights: Tensor, config: LearngenesConfig) -> Tailors:
    """Fit base, tailors and gates to a weight of every expert by alternating least squares; no round adds error."""
    stack = weights.flatten(2).double()
    count, rows, columns = stack.shape
    rank = max(1, round(config.rank * min(rows, columns)))
    base = fit_base(stack.float(), rank, START_ROUNDS).double()
    parts = [factorize((matrix - base).float(), rank) for matrix in stack]
    left, right = (torch.cat([part[side] for part in parts]).double() for side in (LEFT, RIGHT))
    gates = torch.eye(count, dtype=torch.float64).repeat_interleave(rank, 1)
    kept = (left.norm(dim=1) * right.norm(dim=1)).argsort(descending=True)[: _count_tailors(stack, rank, config)]
    left, right, gates = left[kept], right[kept], gates[:, kept]
    for _ in range(config.rounds):
        left = _solve_side(stack - base, gates[:, :, None] * right)
        right = _solve_side((stack - base).transpose(1, 2), gates[:, :, None] * left)
        if config.learn_gates:
            gates = _solve_gates(stack - base, left, right)
            left, right, gates = _balance(left, right, gates)
        base = (stack - (gates[:, :, None] * left).transpose(1, 2) @ right).mean(0)
    parts_of_weight = base.reshape(weights.shape[1:]).float(), left.float(), right.float(), gates.float()
    return Tailors(*parts_of_weight, learn_gates=config.learn_gates)


def _count_tailors(stack: Stack, rank: int, config: LearngenesConfig) -> int:
    """Return the tailors, with their gates in no more bits than differences of this rank."""
    bits = config.bits * (stack.shape[1] + stack.shape[2])
    gates = GATE_BITS * len(stack)
    return max(1, len(stack) * rank * bits // (bits + gates))


def _solve_side(delta: Stack, factors: Float[Tensor, "expert tailor column"]) -> Float[Tensor, "tailor row"]:
    """Return the directions of one side, by least squares; `factors` are those of the other side times the gates."""
    gram = (factors @ factors.transpose(1, 2)).sum(0)
    return _solve(gram, (factors @ delta.transpose(1, 2)).sum(0))


def _solve_gates(delta: Stack, left: Tensor, right: Tensor) -> Gates:
    """Return the gates of all experts, by least squares."""
    return _solve((left @ left.T) * (right @ right.T), ((left @ delta) * right).sum(2).T).T


def _solve(gram: Tensor, target: Tensor) -> Tensor:
    ridge = RIDGE * gram.trace() / len(gram) + torch.finfo(gram.dtype).tiny
    solution: Tensor = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), target)
    return solution


def _balance(left: Tensor, right: Tensor, gates: Gates) -> tuple[Tensor, Tensor, Gates]:
    """Scale every tailor so that its largest gate is 1 and both of its directions are equally long."""
    largest = gates.abs().amax(0)
    lengths = [torch.where(part.norm(dim=1) > 0, part.norm(dim=1), 1.0) for part in (left, right)]
    scale = (lengths[0] * lengths[1] * largest).sqrt()
    left, right = (part * (scale / length)[:, None] for part, length in zip((left, right), lengths, strict=True))
    return left, right, gates / torch.where(largest > 0, largest, 1.0)


def _store(
    models: Sequence[nn.Module], name: str, weights: Tensor, tailors: Tailors, config: LearngenesConfig
) -> tuple[SharedBase, list[SharedWeight]]:
    """Replace one weight in all models by what is shared and its gates, in place; untrained ones fit what is stored."""
    shape = tuple(weights.shape[1:])
    values = {FULL: tailors.base.detach(), LEFT: tailors.left.detach(), RIGHT: tailors.right.detach()}
    bits = {FULL: config.base_bits, LEFT: config.bits, RIGHT: config.bits}
    stored = {
        part: StoredMatrix.from_matrix(
            matrix, MatrixFormat(bits=bits[part], group_size=config.group_size, shape=tuple(matrix.shape))
        )
        for part, matrix in values.items()
    }
    base, gates = SharedBase(stored), tailors.gates.detach()
    if config.training is None and config.learn_gates:
        full, left, right = (stored[part]().double() for part in (FULL, LEFT, RIGHT))
        gates = _solve_gates((weights - full).flatten(2).double(), left, right).float()
    sharing = SharedWeightConfig(
        delta="gates", bits=config.bits, group_size=config.group_size, shape=shape, directions=len(values[LEFT])
    )
    return base, [share_weight(model, name, sharing, base, {}, own) for model, own in zip(models, gates, strict=True)]


class _GatedWeight(nn.Module):
    """Returns an expert's weight from tailors that are parameters of the module around all experts."""

    def __init__(self, tailors: Tailors, place: int) -> None:
        super().__init__()
        self.tailors, self.place = [tailors], place

    def forward(self, _empty: Tensor) -> Tensor:
        return self.tailors[0].weight(self.place)


class GatedExperts(nn.Module):
    """Copies of all experts whose large weights are computed from shared tailors; all else is frozen."""

    def __init__(self, models: Sequence[nn.Module], fitted: Mapping[str, Tailors]) -> None:
        """Take copies of the experts' networks, which are changed in place, and the tailors of each weight."""
        super().__init__()
        self.networks, self.tailors = nn.ModuleList(models), nn.ModuleList(fitted.values())
        for place, model in enumerate(models):
            model.requires_grad_(requires_grad=False)
            for name, tailors in fitted.items():
                owner, _, parameter = name.rpartition(".")
                module = model.get_submodule(owner)
                delattr(module, parameter)
                module.register_buffer(parameter, torch.empty(0))
                parametrize.register_parametrization(module, parameter, _GatedWeight(tailors, place), unsafe=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignmentLoss:
    """The error of the outputs of all experts, and of the direction of their features after a block."""

    experts: Sequence[Expert]
    """The experts before compression, on the device of the training."""
    ids: Sequence[int]
    training: TrainingConfig
    block: str
    """Path of the block; empty without alignment."""
    weight: float

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the mean over all rows, each through the expert of its cluster."""
        networks: Any = model.get_submodule("networks")
        totals: dict[str, Tensor] = {}
        for place, (k, expert) in enumerate(zip(self.ids, self.experts, strict=True)):
            rows = (batch.cluster_id == k).nonzero().squeeze(-1)
            if not len(rows):
                continue
            part = at_few_step_times(batch.rows(rows), expert.few_step, self.training)
            output, features = self._run(networks[place], expert, part)
            with torch.no_grad():
                exact, exact_features = self._run(expert.model, expert, part)
            terms = {"error": functional.mse_loss(output, exact)}
            if self.block:
                cosine = functional.cosine_similarity(features[0].float(), exact_features[0].float(), dim=-1).mean()
                terms["alignment"] = 1 - cosine
            for name, value in terms.items():
                totals[name] = totals.get(name, 0.0) + value * (len(rows) / len(batch.t))
        return totals | {"loss": totals["error"] + self.weight * totals.get("alignment", torch.tensor(0.0))}

    def _run(self, model: nn.Module, expert: Expert, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Return the output of a network and the features after the block."""
        features: list[Any] = []
        paths = [self.block] if self.block else []
        with record_calls(model, paths, lambda _path, _input, output: features.append(output)):
            output = run_network(model, expert, batch)
        index = ADAPTERS[type(expert.model).__name__].block_output
        return output, [part[index] if isinstance(part, tuple) else part for part in features]


def _train(
    fitted: Mapping[str, Tailors],
    experts: Mapping[int, Expert],
    data: LatentDataset,
    config: LearngenesConfig,
    training: TrainingConfig,
    workspace: Workspace,
) -> tuple[float, dict[str, float]]:
    """Train tailors on the outputs of the experts, in place if that lowers their error; return FLOPs and errors."""
    ids, device = sorted(experts), check_device(training.device)
    present = torch.isin(data.cluster_id, torch.tensor(ids)).nonzero().squeeze(-1)
    model = GatedExperts([deepcopy(experts[k].model) for k in ids], deepcopy(dict(fitted)))
    loss = AlignmentLoss(
        experts=[replace(experts[k], model=deepcopy(experts[k].model)) for k in ids],
        ids=ids,
        training=training,
        block=_early_block(experts[ids[0]].model) if config.align_weight else "",
        weight=config.align_weight,
    )
    for expert in loss.experts:
        move_model(expert.model, device)
    own_data = data.select(present)
    batches = [make_batch(own_data, training, HELD_OUT + step) for step in range(MEASURED_BATCHES)]
    errors = {"error_fitted": _mean_error(loss, model.to(device), batches)}
    trained = fit(model, loss, own_data, training, workspace.part("learngenes")).model
    errors["error_trained"] = _mean_error(loss, trained.to(device), batches)
    if errors["error_trained"] < errors["error_fitted"]:
        for tailors, own in zip(fitted.values(), trained.get_submodule("tailors").children(), strict=True):
            tailors.load_state_dict(own.state_dict())
    row = network_flops(experts[ids[0]].model, data.latent_shape)
    return training_flops(row, training.batch_size, training.steps) * 4 / 3, errors


def _mean_error(loss: AlignmentLoss, model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the mean squared error of the outputs on batches that no training draws."""
    with torch.no_grad():
        errors = [loss(model, batch.to(next(model.parameters()).device))["error"] for batch in batches]
    return float(torch.stack(errors).mean())


def _early_block(model: nn.Module) -> str:
    """Return the path of the block that ends the first third; raise `StageError` for a network without blocks."""
    paths = block_paths(model)
    if not paths:
        raise StageError(
            f"quantize.align_weight aligns features after a block, and {type(model).__name__} has none of one width; "
            "set quantize.align_weight=0"
        )
    return paths[(len(paths) - 1) // 3]
