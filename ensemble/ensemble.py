"""Many experts, one velocity field; a monolith is an ensemble of one.

u(x, t | c) = sum_k p(k | x, t, c) u_k(x, t | c)      McAllister et al. 2025, arXiv:2501.05450, equation (7)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ensemble.routing import RoutingState
from ensemble.solvers import scale_initial_noise
from experts.compressed.caching.feature_cache import ExpertCache
from experts.condition import Condition
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import NoiseSchedule, NoiseSource, expand
from router.config import SelectionConfig
from router.selection import get_selection

Latents = Float[Tensor, "batch *latent"]
Times = Float[Tensor, "batch *inside"]
"""One t a row, or one for each part of a row."""
RowTimes = Float[Tensor, " batch"]
Logits = Float[Tensor, "batch expert"]
Gates = Float[Tensor, "batch expert"]


class EnsembleError(ValueError):
    """Experts and router do not make an ensemble."""


@runtime_checkable
class ExpertModel(Protocol):
    """What the ensemble knows of an expert: `experts.expert.Expert`, or anything with a velocity."""

    def velocity(self, noised: Latents, t: Tensor, condition: Condition, path: NoiseSchedule) -> Latents:
        """The velocity of every row on `path`."""

    def to(self, device: torch.device | str) -> "ExpertModel":
        """The same expert on another device."""

    def save(self, folder: Path) -> None:
        """Write the expert's folder."""


@runtime_checkable
class Coursed(Protocol):
    """An expert that may be asked at few t only."""

    @property
    def few_step(self) -> FewStepSchedule | None:
        """Those t; None is any t."""


@runtime_checkable
class Beginning(Protocol):
    """An expert whose trajectories begin with a draft of their own."""

    def initial_latents(
        self, noise: NoiseSource, condition: Condition, path: NoiseSchedule, kept: ExpertCache
    ) -> Latents:
        """Noised samples at the first t of its course."""


@runtime_checkable
class Recalling(Protocol):
    """An expert that may have a cache."""

    def create_cache(
        self,
        noised: Latents,
        t: Tensor,
        condition: Condition,
        path: NoiseSchedule,
        rows: Int[Tensor, " row"],
        kept: ExpertCache,
    ) -> Latents:
        """The velocity of these rows of a trajectory, with what they have kept."""


@runtime_checkable
class RouterModel(Protocol):
    """What the ensemble knows of a router: `router.router.Router`, or anything that knows p(k | ...)."""

    @property
    def num_experts(self) -> int:
        """K, missing experts included."""

    def logits(self, noised: Latents, t: RowTimes, condition: Condition) -> Logits:
        """log p(k | noised, t, condition) up to a constant a row."""

    def prior_logits(self, condition: Condition, present: Bool[Tensor, " expert"] | None = None) -> Logits:
        """log p(k | condition) among the present experts, up to a constant a row."""

    def to(self, device: torch.device | str) -> "RouterModel":
        """The same router on another device."""

    def save(self, folder: Path) -> None:
        """Write the router's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOutput:
    """What one expert said, for the rows that asked it."""

    rows: Int[Tensor, " row"]
    gates: Float[Tensor, " row"]
    velocity: Latents


def combine_velocities(like: Latents, spoken: Sequence[ExpertOutput]) -> Latents:
    """The experts' velocities, added by their gates: the one place that knows in which space experts mix."""
    mixed = torch.zeros_like(like)
    for said in spoken:
        weighed = expand(said.gates, said.velocity).to(said.velocity.dtype) * said.velocity
        mixed = mixed.index_add(0, said.rows, weighed.to(mixed.dtype))
    return mixed


@dataclass(frozen=True, slots=True, kw_only=True)
class Ensemble:
    """Experts by their ids, of which some may be missing, and the router that knows how many there should be."""

    experts: Mapping[int, ExpertModel]
    noise_schedule: NoiseSchedule
    """The noise path of what is sampled; experts of another path are matched to it."""
    router: RouterModel | None = None
    """None only for a single expert, of id 0."""

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled."""
        allowed = range(self.num_experts)
        if not self.experts:
            raise EnsembleError("an ensemble needs an expert and all are missing; train or add at least one")
        if unknown := sorted(set(self.experts) - set(allowed)):
            way_out = "add their router" if self.router is None else "use the router of their partition"
            raise EnsembleError(f"expert ids must be in 0 ... {len(allowed) - 1}; got {unknown}; {way_out}")
        path = getattr(self.router, "noise_schedule", self.noise_schedule)
        if path.name != self.noise_schedule.name:
            raise EnsembleError(
                f"the router was trained on the {path.name} path, the ensemble is on {self.noise_schedule.name}; use the former"
            )

    @property
    def num_experts(self) -> int:
        """K, missing experts included."""
        return 1 if self.router is None else self.router.num_experts

    @property
    def few_step(self) -> FewStepSchedule | None:
        """The few t at which its experts are to be asked; None is any t. `EnsembleError` if they do not agree."""
        found = {expert.few_step if isinstance(expert, Coursed) else None for expert in self.experts.values()}
        if len(found) > 1:
            raise EnsembleError(
                "the experts of an ensemble go through the same times, and these have courses of "
                f"{sorted(len(one.times) if one else 0 for one in found)} steps (0 is any t); distil all of them alike"
            )
        return next(iter(found))

    @property
    def missing(self) -> tuple[int, ...]:
        """Ids of the experts that are not here."""
        return tuple(k for k in range(self.num_experts) if k not in self.experts)

    def to(self, device: torch.device | str) -> "Ensemble":
        """The same ensemble with its networks moved to a device, in place."""
        experts = {k: expert.to(device) for k, expert in self.experts.items()}
        return replace(self, experts=experts, router=self.router and self.router.to(device))

    def init_routing(self, seeds: Sequence[int], condition: Condition, selection: SelectionConfig) -> RoutingState:
        """The state of new trajectories; `sticky` and its like draw their experts now, from p(k | condition)."""
        if len(seeds) != len(condition):
            raise ValueError(f"every row needs a seed; got {len(seeds)} seeds for {len(condition)} conditions")
        if not get_selection(selection).draws_from_prior:
            return RoutingState(seeds=tuple(seeds), selection=selection)
        return RoutingState.from_prior(seeds, self._prior_logits(condition), selection)

    def gates(self, noised: Latents, t: Times, condition: Condition, routing: RoutingState) -> Gates:
        """Mixing coefficients of every row; missing experts are silent, the others share what was theirs."""
        t = _gates_of_rows(t)
        standing = routing.fixed_gates(t)
        if standing is not None:
            return standing
        routing.calls.router += len(noised) if self.router else 0
        return routing.update_gates(self._logits(noised, t, condition), t)

    def velocity(self, noised: Latents, t: Times, condition: Condition, routing: RoutingState) -> Latents:
        """The marginal velocity; each expert is called once at most, on the rows that chose it."""
        gates = self.gates(noised, t, condition, routing)
        spoken = []
        for k in sorted(self.experts):
            rows = gates[:, k].nonzero().squeeze(-1)
            if len(rows):
                said = self._expert_velocity(k, noised[rows], t[rows], condition.rows(rows), rows, routing)
                spoken.append(ExpertOutput(rows=rows, gates=gates[rows, k], velocity=said))
                routing.calls.experts[k] += len(rows)
        return combine_velocities(noised, spoken)

    def initial_latents(self, noise: NoiseSource, condition: Condition, routing: RoutingState) -> Latents:
        """Where trajectories begin: with noise, or with the draft of an expert that the prior draws for each."""
        begun = scale_initial_noise(noise(0), self.few_step, self.noise_schedule)
        if not any(isinstance(expert, Beginning) for expert in self.experts.values()):
            return begun
        opened = RoutingState.from_prior(routing.seeds, self._prior_logits(condition), SelectionConfig(name="sticky"))
        gates = opened.gates if routing.memory.gates is None else routing.memory.gates
        for k, expert in sorted(self.experts.items()):
            rows = gates[:, k].nonzero().squeeze(-1)
            if isinstance(expert, Beginning) and len(rows):
                own = expert.initial_latents(
                    _rows_of(noise, rows), condition.rows(rows), self.noise_schedule, routing.cache_for(k)
                )
                begun = begun.index_copy(0, rows, own.to(begun.dtype))
        return begun

    def _expert_velocity(
        self, k: int, noised: Latents, t: Times, condition: Condition, rows: Int[Tensor, " row"], routing: RoutingState
    ) -> Latents:
        """What an expert says of some rows of a trajectory, which may have kept some of its features."""
        expert, kept = self.experts[k], routing.cache_for(k)
        if isinstance(expert, Recalling):
            return expert.create_cache(noised, t, condition, self.noise_schedule, rows, kept)
        kept.count(float(len(rows)))
        return expert.velocity(noised, t, condition, self.noise_schedule)

    def _present(self, device: torch.device) -> Bool[Tensor, " expert"]:
        return torch.tensor([k in self.experts for k in range(self.num_experts)], device=device)

    def _logits(self, noised: Latents, t: RowTimes, condition: Condition) -> Logits:
        """The router's logits, -inf for missing experts; all mass is on the only expert without a router."""
        if self.router is None:
            return noised.new_zeros(len(noised), 1)
        logits = self.router.logits(noised, t, condition)
        return logits.masked_fill(~self._present(logits.device), -torch.inf)

    def _prior_logits(self, condition: Condition) -> Logits:
        """The same for the prior."""
        if self.router is None:
            return torch.zeros(len(condition), 1, device=condition.class_id.device)
        return self.router.prior_logits(condition, self._present(condition.class_id.device))


def _rows_of(noise: NoiseSource, rows: Int[Tensor, " row"]) -> NoiseSource:
    return lambda occasion: noise(occasion)[rows]


def _gates_of_rows(t: Times) -> RowTimes:
    """What the router sees of t: its mean over the row."""
    return t if t.ndim == 1 else t.flatten(1).mean(1)
