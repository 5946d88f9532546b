"""Features that the samples of one trajectory keep from one evaluation to the next.

A module that is not due says what it said before, or goes on from it:

    f(i) = f(a) + (i - a) d1 + (i - a)^2 / 2 d2,    d1 = (f(a) - f(b)) / (a - b), ...

where a and b are the evaluations at which it was last computed (Liu et al. 2025, TaylorSeer, arXiv:2503.06923). Order 0
is plain reuse, as in DeepCache (Ma et al. 2024, arXiv:2312.00858).
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

Rows = Int[Tensor, " row"]
CachedOutputs = dict[str, list[tuple[int, Any]]]
"""By a module's path: at which evaluation it said what, the latest last; tensors, or tuples of them."""
ModuleOutput = Callable[[Rows], Tensor]


@dataclass(slots=True, kw_only=True)
class CachedRows:
    """Samples that came to an expert at the same evaluation, and so have kept the same modules."""

    rows: Rows
    kept: CachedOutputs
    index: int
    """The evaluation at which it was last asked; who skips one has spoken to another expert, and comes back anew."""


@dataclass(slots=True, kw_only=True)
class FeatureCache:
    """What the samples of a trajectory have kept of one network; new with every trajectory, and its own."""

    groups: list[CachedRows] = field(default_factory=list)

    def run(
        self, model: nn.Module, plan: CacheSchedule, t: float, rows: Rows, said: ModuleOutput
    ) -> tuple[Tensor, float]:
        """What `said` says of all rows, and how many full calls on a row that took; new rows get all of it.

        `said` calls the model on some of the rows, given by their places in `rows`.
        """
        index = plan.index(t)
        is_new = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        parts: list[tuple[Rows, Tensor]] = []
        work = 0.0
        groups, self.groups = self.groups, []
        for group in groups:
            stays = torch.isin(group.rows, rows)
            if not stays.any() or index - group.index > 1:
                continue
            if not stays.all():
                group = CachedRows(rows=group.rows[stays], kept=_chosen(group.kept, stays), index=index)
            group.index = index
            places = _places(group.rows, rows)
            is_new[places] = False
            with skip_cached_modules(model, plan, index, group.kept):
                parts.append((places, said(places)))
            work += len(places) * plan.relative_flops[index]
            self.groups.append(group)
        if is_new.any():
            places, kept = is_new.nonzero().squeeze(-1), CachedOutputs()
            with skip_cached_modules(model, plan, index, kept):
                parts.append((places, said(places)))
            work += len(places)
            self.groups.append(CachedRows(rows=rows[places], kept=kept, index=index))
        if len(parts) == 1 and torch.equal(parts[0][0], torch.arange(len(rows), device=rows.device)):
            return parts[0][1], work
        whole = torch.cat([part for _, part in parts])
        return torch.empty_like(whole).index_copy(0, torch.cat([places for places, _ in parts]), whole), work


@dataclass(slots=True, kw_only=True)
class ExpertCache:
    """What one trajectory remembers of an expert: the features of each of its networks, and how much they worked."""

    name: str
    """Of the expert or the network: `3`, or `3/0` where expert 3 has several."""
    work: dict[str, float] = field(default_factory=dict)
    """By these names: calls on a row so far, in full ones."""
    features: FeatureCache = field(default_factory=FeatureCache)
    hooked: HookedModels = field(default_factory=HookedModels)
    inside: dict[str, "ExpertCache"] = field(default_factory=dict)

    def part(self, name: str) -> "ExpertCache":
        """What is remembered of one network of several."""
        return self.inside.setdefault(name, ExpertCache(name=f"{self.name}/{name}", work=self.work))

    def count(self, calls: float) -> None:
        """Add calls on a row."""
        self.work[self.name] = self.work.get(self.name, 0.0) + calls


@contextmanager
def skip_cached_modules(model: nn.Module, plan: CacheSchedule, index: int, kept: CachedOutputs) -> Iterator[None]:
    """Within it, modules that are not due at this evaluation are not called, and those that are leave their answers.

    `AttributeError` if the network lacks a module of the plan.
    """
    modules = {path: model.get_submodule(path) for path in plan.compute_steps}
    for path, module in modules.items():
        is_due = index in plan.compute_steps[path]
        module.forward = _cached_forward(module.forward, kept.setdefault(path, []), index, is_due, plan.order)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward


def _cached_forward(
    forward: Callable[..., Any], kept: list[tuple[int, Any]], index: int, is_due: bool, order: int
) -> Callable[..., Any]:
    """A module's forward that looks first at what it has said."""

    def recalled(*args: Any, **kwargs: Any) -> Any:
        if kept and not is_due:
            return taylor_extrapolate(kept, index)
        said = forward(*args, **kwargs)
        if kept and kept[-1][0] == index:
            kept.pop()
        kept.append((index, said))
        del kept[: -order - 1]
        return said

    return recalled


def taylor_extrapolate(kept: Sequence[tuple[int, Any]], index: int) -> Any:
    """The equation above, of as high an order as there are answers for."""
    at, latest = kept[-1]
    if len(kept) == 1 or index == at:
        return latest
    ahead = index - at
    slope = _joined(_slope, kept[-1], kept[-2])
    if len(kept) == 2:
        return _tree(lambda value, first: value + ahead * first, latest, slope)
    before = _joined(_slope, kept[-2], kept[-3])
    gap = at - kept[-2][0]
    return _tree(
        lambda value, first, earlier: value + ahead * first + ahead**2 / 2 * (first - earlier) / gap,
        latest,
        slope,
        before,
    )


def _slope(late: Tensor, early: Tensor, gap: int) -> Tensor:
    return (late - early) / gap


def _joined(rule: Callable[[Tensor, Tensor, int], Tensor], late: tuple[int, Any], early: tuple[int, Any]) -> Any:
    return _tree(lambda a, b: rule(a, b, late[0] - early[0]), late[1], early[1])


def _tree(rule: Callable[..., Tensor], first: Any, *others: Any) -> Any:
    """A function of tensors on tuples of them."""
    if isinstance(first, Tensor):
        return rule(first, *others)
    return tuple(_tree(rule, *parts) for parts in zip(first, *others, strict=True))


def _chosen(kept: Mapping[str, Sequence[tuple[int, Any]]], rows: Tensor) -> CachedOutputs:
    """What some of the samples have kept; `rows` is a mask."""
    return {
        path: [(index, _tree(lambda value: value[rows], said)) for index, said in found] for path, found in kept.items()
    }


def _places(rows: Rows, among: Int[Tensor, " among"]) -> Rows:
    """Where each of `rows` stands in `among`, which holds them all."""
    order = among.argsort()
    return order[torch.searchsorted(among[order], rows)]
