"""Which units of a network stay: by a score of each, under a share of units or of parameters."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ensemble.compression.method import StageError
from experts.compressed.pruning.units import parameters_per_unit, prunable_units, unit_groups

Scores = Mapping[str, Tensor]
"""What each unit of a layer is worth, one number a unit, by the layer's path; the least go first."""


def magnitude_importance(model: nn.Module) -> Scores:
    """The root mean square of the weights that write and read each unit."""
    found, scores = unit_groups(model), {}
    for path, count in prunable_units(model).items():
        units, module = found[path], model.get_submodule(path)
        read = module.get_submodule(units.reader).get_parameter("weight").detach().transpose(0, 1)
        parts = [read.reshape(count, -1)]
        for writer, times in units.writers.items():
            written = module.get_submodule(writer).get_parameter("weight").detach()
            parts.append(written.reshape(times, count, -1).transpose(0, 1).reshape(count, -1))
        scores[path] = torch.cat(parts, 1).float().square().mean(1).sqrt().cpu()
    return scores


def random_importance(counts: Mapping[str, int], seed: int) -> Scores:
    """Numbers that say nothing."""
    generator = torch.Generator().manual_seed(seed)
    return {path: torch.rand(count, generator=generator) for path, count in counts.items()}


def select_units(
    model: nn.Module, scores: Scores, share: float, by: Literal["units", "parameters"]
) -> dict[str, list[int]]:
    """The units that stay, by path, where the least go; each layer's best always stays.

    Raises `StageError` if that much cannot go, or nothing would.
    """
    sizes = parameters_per_unit(model)
    if by == "parameters":
        whole = sum(parameter.numel() for parameter in model.parameters())
        gone = _least(scores, sizes, share * whole)
    else:
        gone = set[tuple[str, int]]()
        for paths in _kinds(model, scores):
            among = {path: scores[path] for path in paths}
            target = float(math.floor(share * sum(len(score) for score in among.values())))
            gone |= _least(among, dict.fromkeys(paths, 1), target)
    if not gone:
        raise StageError(f"a share of {share} is not one whole unit of any kind, so nothing would change; raise it")
    kept = {path: [unit for unit in range(len(score)) if (path, unit) not in gone] for path, score in scores.items()}
    return {path: units for path, units in kept.items() if len(units) < len(scores[path])}


def _kinds(model: nn.Module, scores: Scores) -> list[list[str]]:
    """Paths of layers of the same kind."""
    found: dict[type[nn.Module], list[str]] = {}
    for path in scores:
        found.setdefault(type(model.get_submodule(path)), []).append(path)
    return list(found.values())


def _least(scores: Scores, sizes: Mapping[str, int], target: float) -> set[tuple[str, int]]:
    """Units of the least scores, in their order, until sizes of at least `target` are together."""
    best = {(path, int(score.argmax())) for path, score in scores.items()}
    flat = [(float(worth), path, unit) for path, score in scores.items() for unit, worth in enumerate(score)]
    gone, removed = set[tuple[str, int]](), 0.0
    for _, path, unit in sorted(flat):
        if removed >= target:
            break
        if (path, unit) not in best:
            gone.add((path, unit))
            removed += sizes[path]
    if removed < target:
        raise StageError(
            f"only {removed:.0f} of the {target:.0f} that should go can, as every layer keeps one unit; lower the share"
        )
    return gone
