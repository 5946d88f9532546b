"""Feature caches: module outputs that the samples of one trajectory reuse from step to step.

On skipped steps a module returns its cached output, or extrapolates it with a finite-difference Taylor series:

    f(i) = f(a) + (i - a) d1 + (i - a)^2 / 2 d2,    d1 = (f(a) - f(b)) / (a - b), ...

where a and b are the latest steps at which it was computed (Liu et al. 2025, TaylorSeer, arXiv:2503.06923). Order 0 is
plain reuse, as in DeepCache (Ma et al. 2024, arXiv:2312.00858).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from experts.compressed.caching.diffusers_hooks import HookedModels
from experts.compressed.caching.plan import CacheSchedule
from experts.types import RowIds

CachedOutput = tuple[int, Any]
"""The step at which a module was computed, and its output: a tensor, or a tuple of them."""
CachedOutputs = dict[str, list[CachedOutput]]
"""The latest outputs of each module by its path, the newest last."""
ModuleOutput = Callable[[RowIds], Tensor]


@dataclass(slots=True, kw_only=True)
class CachedRows:
    """Samples that reached an expert at the same step, and so have outputs of the same modules."""

    rows: RowIds
    outputs: CachedOutputs
    index: int
    """The step of their latest evaluation. A sample that skips a step used another expert, and returns as new."""


@dataclass(slots=True, kw_only=True)
class FeatureCache:
    """The cached outputs of one network for the samples of one trajectory."""

    groups: list[CachedRows] = field(default_factory=list)

    def run(
        self, model: nn.Module, schedule: CacheSchedule, t: float, rows: RowIds, evaluate: ModuleOutput
    ) -> tuple[Tensor, float]:
        """Return the output for all rows, and its cost in full calls on one row; new rows are computed in full.

        `evaluate` calls the model on some of the rows, given by their positions in `rows`.
        """
        index = schedule.index(t)
        is_new = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        parts: list[tuple[Tensor, Tensor]] = []
        calls = 0.0
        groups, self.groups = self.groups, []
        for group in groups:
            is_present = torch.isin(group.rows, rows)
            if not is_present.any() or index - group.index > 1:
                continue
            if not is_present.all():
                outputs = _select_rows(group.outputs, is_present)
                group = CachedRows(rows=group.rows[is_present], outputs=outputs, index=index)
            group.index = index
            positions = _positions(group.rows, rows)
            is_new[positions] = False
            with skip_cached_modules(model, schedule, index, group.outputs):
                parts.append((positions, evaluate(positions)))
            calls += len(positions) * schedule.relative_flops[index]
            self.groups.append(group)
        if is_new.any():
            positions, outputs = is_new.nonzero().squeeze(-1), CachedOutputs()
            with skip_cached_modules(model, schedule, index, outputs):
                parts.append((positions, evaluate(positions)))
            calls += len(positions)
            self.groups.append(CachedRows(rows=rows[positions], outputs=outputs, index=index))
        return _join_parts(parts, rows), calls


def _join_parts(parts: Sequence[tuple[Tensor, Tensor]], rows: RowIds) -> Tensor:
    """Put the outputs of all parts into the order of the rows; a single part in order is returned unchanged."""
    if len(parts) == 1 and torch.equal(parts[0][0], torch.arange(len(rows), device=rows.device)):
        return parts[0][1]
    joined = torch.cat([output for _, output in parts])
    return torch.empty_like(joined).index_copy(0, torch.cat([positions for positions, _ in parts]), joined)


@dataclass(slots=True, kw_only=True)
class ExpertCache:
    """The caches of one expert in one trajectory: of each of its networks, with their counts of calls."""

    name: str
    """Of the expert or the network: `3`, or `3/0` where expert 3 has several."""
    work: dict[str, float] = field(default_factory=dict)
    """Calls on a row so far, in units of full calls, by these names."""
    features: FeatureCache = field(default_factory=FeatureCache)
    hooked_models: HookedModels = field(default_factory=HookedModels)
    children: dict[str, "ExpertCache"] = field(default_factory=dict)

    def child(self, name: str) -> "ExpertCache":
        """Return the cache of one of several networks."""
        return self.children.setdefault(name, ExpertCache(name=f"{self.name}/{name}", work=self.work))

    def count(self, calls: float) -> None:
        """Add calls on a row."""
        self.work[self.name] = self.work.get(self.name, 0.0) + calls


@contextmanager
def skip_cached_modules(
    model: nn.Module, schedule: CacheSchedule, index: int, outputs: CachedOutputs
) -> Iterator[None]:
    """Replace the forward of every module of the schedule: skip it on this step, or compute it and store its output.

    Raises `AttributeError` if the network lacks a module of the schedule.
    """
    modules = {path: model.get_submodule(path) for path in schedule.compute_steps}
    for path, module in modules.items():
        is_due = index in schedule.compute_steps[path]
        module.forward = _cached_forward(module.forward, outputs.setdefault(path, []), index, is_due, schedule.order)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def _cached_forward(
    forward: Callable[..., Any], outputs: list[CachedOutput], index: int, is_due: bool, order: int
) -> Callable[..., Any]:
    """Return a forward that extrapolates cached outputs on skipped steps."""

    def cached_forward(*args: Any, **kwargs: Any) -> Any:
        if outputs and not is_due:
            return taylor_extrapolate(outputs, index)
        output = forward(*args, **kwargs)
        if outputs and outputs[-1][0] == index:
            outputs.pop()
        outputs.append((index, output))
        del outputs[: -order - 1]
        return output

    return cached_forward


def taylor_extrapolate(outputs: Sequence[CachedOutput], index: int) -> Any:
    """Extrapolate the equation above to step `index`, to the order that the number of outputs allows."""
    latest_index, latest = outputs[-1]
    if len(outputs) == 1 or index == latest_index:
        return latest
    distance = index - latest_index
    slope = _finite_difference(outputs[-1], outputs[-2])
    if len(outputs) == 2:
        return _map_tensors(lambda value, first: value + distance * first, latest, slope)
    previous_slope = _finite_difference(outputs[-2], outputs[-3])
    gap = latest_index - outputs[-2][0]
    return _map_tensors(
        lambda value, first, earlier: value + distance * first + distance**2 / 2 * (first - earlier) / gap,
        latest,
        slope,
        previous_slope,
    )


def _finite_difference(late: CachedOutput, early: CachedOutput) -> Any:
    gap = late[0] - early[0]
    return _map_tensors(lambda a, b: (a - b) / gap, late[1], early[1])


def _map_tensors(function: Callable[..., Tensor], first: Any, *others: Any) -> Any:
    """Apply a function of tensors to tensors, or to nested tuples of them element by element; None stays None."""
    if first is None:
        return None
    if isinstance(first, Tensor):
        return function(first, *others)
    return tuple(_map_tensors(function, *parts) for parts in zip(first, *others, strict=True))


def _select_rows(outputs: Mapping[str, Sequence[CachedOutput]], mask: Tensor) -> CachedOutputs:
    """Return the cached outputs of the samples where `mask` is true."""
    return {
        path: [(index, _map_tensors(lambda value: value[mask], output)) for index, output in entries]
        for path, entries in outputs.items()
    }


def _positions(rows: RowIds, among: Int[Tensor, " among"]) -> RowIds:
    """Return the position of each of `rows` in `among`, which contains them all."""
    order = among.argsort()
    return order[torch.searchsorted(among[order], rows)]
