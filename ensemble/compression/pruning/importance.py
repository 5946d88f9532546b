"""Score the units of a network, and select those that stay for a target share of units or of parameters."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ensemble.compression.method import StageError
from experts.compressed.pruning.units import parameters_per_unit, prunable_units, unit_groups
from experts.training.flops import count_parameters

Scores = Mapping[str, Tensor]
"""Importance of the units of each layer, by its path; the lowest are removed first."""


def magnitude_importance(model: nn.Module) -> Scores:
    """Return the root mean square of the weights into and out of each unit."""
    groups, scores = unit_groups(model), {}
    for path, count in prunable_units(model).items():
        units, module = groups[path], model.get_submodule(path)
        read = module.get_submodule(units.reader).get_parameter("weight").detach().transpose(0, 1)
        parts = [read.reshape(count, -1)]
        for writer, times in units.writers.items():
            written = module.get_submodule(writer).get_parameter("weight").detach()
            parts.append(written.reshape(times, count, -1).transpose(0, 1).reshape(count, -1))
        scores[path] = torch.cat(parts, 1).float().square().mean(1).sqrt().cpu()
    return scores


def random_importance(counts: Mapping[str, int], seed: int) -> Scores:
    """Return random scores, as a baseline."""
    generator = torch.Generator().manual_seed(seed)
    return {path: torch.rand(count, generator=generator) for path, count in counts.items()}


def select_units(
    model: nn.Module, scores: Scores, share: float, by: Literal["units", "parameters"]
) -> dict[str, list[int]]:
    """Return the units that stay, by path, of all layers that lose units; each layer's best unit always stays.

    Raises `StageError` if so much cannot be removed, or if nothing would be.
    """
    sizes = parameters_per_unit(model)
    if by == "parameters":
        total = count_parameters(model)
        removed = _select_lowest(scores, sizes, share * total)
    else:
        removed = set[tuple[str, int]]()
        for paths in _group_by_kind(model, scores):
            of_kind = {path: scores[path] for path in paths}
            target = float(math.floor(share * sum(len(score) for score in of_kind.values())))
            removed |= _select_lowest(of_kind, dict.fromkeys(paths, 1), target)
    if not removed:
        raise StageError(f"prune.ratio {share} is less than one unit of any kind, so nothing would change; raise it")
    remaining = {
        path: [unit for unit in range(len(score)) if (path, unit) not in removed] for path, score in scores.items()
    }
    return {path: units for path, units in remaining.items() if len(units) < len(scores[path])}


def _group_by_kind(model: nn.Module, scores: Scores) -> list[list[str]]:
    """Return the paths of the layers, one list per kind of layer."""
    kinds: dict[type[nn.Module], list[str]] = {}
    for path in scores:
        kinds.setdefault(type(model.get_submodule(path)), []).append(path)
    return list(kinds.values())


def _select_lowest(scores: Scores, sizes: Mapping[str, int], target: float) -> set[tuple[str, int]]:
    """Return the units of the lowest scores whose sizes add up to at least `target`, sparing the best of each layer."""
    best = {(path, int(score.argmax())) for path, score in scores.items()}
    flat = [(float(value), path, unit) for path, score in scores.items() for unit, value in enumerate(score)]
    selected, total = set[tuple[str, int]](), 0.0
    for _, path, unit in sorted(flat):
        if total >= target:
            break
        if (path, unit) not in best:
            selected.add((path, unit))
            total += sizes[path]
    if total < target:
        raise StageError(
            f"prune.ratio removes a total size of {target:.0f}, and only {total:.0f} can be removed, since every layer "
            "keeps one unit; lower the ratio"
        )
    return selected
