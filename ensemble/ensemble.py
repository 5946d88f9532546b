"""Many experts, one velocity field; a monolith is an ensemble of one.

u(x, t | c) = sum_k p(k | x, t, c) u_k(x, t | c)      McAllister et al. 2025, arXiv:2501.05450, equation (7)
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ddm_core.errors import DDMError
from ensemble.routing import RoutingState, called_experts
from ensemble.solvers import scale_initial_noise
from experts.compressed.quantization.shared_weight import shared_weights
from experts.conditions.condition import Condition
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import NoiseSchedule, expand
from experts.expert_model import ExpertModel
from experts.types import NoiseSource
from router.config import SelectionConfig
from router.router import Router
from router.selection import get_selection

Latents = Float[Tensor, "batch *latent"]
Times = Float[Tensor, "batch *inside"]
"""One t per row, or one for each element of a row."""
RowTimes = Float[Tensor, " batch"]
Logits = Float[Tensor, "batch expert"]
Gates = Float[Tensor, "batch expert"]


class EnsembleError(DDMError, ValueError):
    """Experts and router do not fit together."""


@runtime_checkable
class RouterModel(Protocol):
    """The interface of a router: `router.router.Router`, or any other source of p(k | ...)."""

    @property
    def num_experts(self) -> int:
        """Return K, missing experts included."""

    def logits(self, noised: Latents, t: RowTimes, condition: Condition) -> Logits:
        """Return log p(k | noised, t, condition) up to a constant per row."""

    def prior_logits(self, condition: Condition, present: Bool[Tensor, " expert"] | None = None) -> Logits:
        """Return log p(k | condition) among the present experts, up to a constant per row."""

    def to(self, device: torch.device | str) -> "RouterModel":
        """Move the router to a device and return it."""

    def save(self, folder: Path) -> None:
        """Write the router's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOutput:
    """Velocity of one expert on the rows where its gate is positive."""

    rows: Int[Tensor, " row"]
    """In rising order."""
    gates: Float[Tensor, " row"]
    velocity: Latents


def combine_velocities(like: Latents, outputs: Sequence[ExpertOutput]) -> Latents:
    """Return the sum of the experts' velocities weighted by their gates, with the shape of `like`.

    Experts are mixed here and nowhere else, in velocity space.
    """
    weighted = [
        (expand(output.gates, output.velocity).to(output.velocity.dtype) * output.velocity).to(like.dtype)
        for output in outputs
    ]
    if len(outputs) == 1 and len(weighted[0]) == len(like):
        return weighted[0]
    total = torch.zeros_like(like)
    for output, part in zip(outputs, weighted, strict=True):
        total = total.index_add(0, output.rows, part)
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Ensemble:
    """Experts by id, some of which may be missing, and the router over all K of them."""

    experts: Mapping[int, ExpertModel]
    noise_schedule: NoiseSchedule
    """Noise schedule of the samples; the velocities of experts with another schedule are converted to it."""
    router: RouterModel | None = None
    """None only for a single expert, of id 0."""
    t_shift: float = 1.0
    """Of the times of its sampling; the experts' `training.t_shift`."""

    def __post_init__(self) -> None:
        """Raise `EnsembleError` if experts, router and noise schedule do not fit together."""
        num_experts = self.num_experts
        if not self.experts:
            raise EnsembleError("an ensemble needs an expert and all are missing; train or add at least one")
        if unknown := sorted(set(self.experts) - set(range(num_experts))):
            remedy = "add their router" if self.router is None else "use the router of their partition"
            raise EnsembleError(f"expert ids must be in 0 ... {num_experts - 1}; got {unknown}; {remedy}")
        schedule = getattr(self.router, "noise_schedule", self.noise_schedule)
        if schedule.name != self.noise_schedule.name:
            raise EnsembleError(
                f"router and ensemble must share a noise schedule; the router was trained on {schedule.name}, "
                f"the ensemble uses {self.noise_schedule.name}; use that of the router"
            )
        if isinstance(self.router, Router) and self.router.reads_experts:
            object.__setattr__(self, "router", replace(self.router, experts=self.experts))

    @property
    def num_experts(self) -> int:
        """Return K, missing experts included."""
        return 1 if self.router is None else self.router.num_experts

    @property
    def few_step(self) -> FewStepSchedule | None:
        """Return the experts' few-step schedule, or None for any t; raise `EnsembleError` if they differ."""
        schedules = {expert.few_step for expert in self.experts.values()}
        if len(schedules) > 1:
            counts = sorted(len(schedule.times) if schedule else 0 for schedule in schedules)
            raise EnsembleError(
                "the experts of an ensemble must share a few-step schedule; got schedules of "
                f"{counts} steps (0 is any t); distill all experts to one schedule"
            )
        return next(iter(schedules))

    @property
    def guides_in_one_call(self) -> bool:
        """Return whether every expert follows the guidance of a condition in one call."""
        return all(expert.guides_in_one_call for expert in self.experts.values())

    @property
    def includes_guidance(self) -> bool:
        """Return whether the experts are students that were distilled with a guidance scale, which cannot be chosen."""
        few_step = self.few_step
        return few_step is not None and few_step.is_distilled and not self.guides_in_one_call

    @property
    def missing(self) -> tuple[int, ...]:
        """Return the ids of the missing experts."""
        return tuple(k for k in range(self.num_experts) if k not in self.experts)

    def shares_weights(self, gates: Gates | None) -> bool:
        """Return whether a call of another expert rebuilds weights, so that each batch should have one expert.

        It looks at the experts with a positive gate; None, gates that are not known yet, is false.
        """
        called = [] if gates is None else [self.experts[k] for k in called_experts(gates)]
        return any(True for expert in called for model in expert.networks() for _ in shared_weights(model))

    def to(self, device: torch.device | str, expert_ids: Collection[int] | None = None) -> "Ensemble":
        """Return the ensemble with its networks moved to a device, in place; of these experts alone, None for all."""
        moved = self.experts if expert_ids is None else expert_ids
        experts = {k: expert.to(device) if k in moved else expert for k, expert in self.experts.items()}
        return replace(self, experts=experts, router=self.router and self.router.to(device))

    def init_routing(self, seeds: Sequence[int], condition: Condition, selection: SelectionConfig) -> RoutingState:
        """Return the state of new trajectories; `sticky` selections draw their experts here, from p(k | condition)."""
        if len(seeds) != len(condition):
            raise ValueError(f"every row needs a seed; got {len(seeds)} seeds for {len(condition)} conditions")
        if not get_selection(selection).draws_from_prior:
            return RoutingState(seeds=tuple(seeds), selection=selection)
        return RoutingState.from_prior(seeds, self._prior_logits(condition), selection)

    def gates(self, noised: Latents, t: Times, condition: Condition, routing: RoutingState) -> Gates:
        """Return the gates of every row; missing experts get 0 and the others are renormalized."""
        t = _row_means(t)
        fixed_gates = routing.fixed_gates(t)
        if fixed_gates is not None:
            return fixed_gates
        routing.calls.router += len(noised) if self.router else 0
        return routing.update_gates(self._logits(noised, t, condition), t)

    def velocity(self, noised: Latents, t: Times, condition: Condition, routing: RoutingState) -> Latents:
        """Return the marginal velocity; each expert is called at most once, on the rows where its gate is positive."""
        gates = self.gates(noised, t, condition, routing)
        outputs = []
        for called in routing.expert_rows(gates):
            k, rows, expert = called.expert_id, called.rows, self.experts[called.expert_id]
            inputs = noised, t, condition, self.noise_schedule
            if len(rows) < len(noised):
                inputs = noised[rows], t[rows], condition.rows(rows), self.noise_schedule
            cache = routing.cache_for(k)
            if expert.needs_cache:
                velocity = expert.cached_velocity(*inputs, rows, cache)
            else:
                velocity = expert.velocity(*inputs)
                cache.count(float(len(rows)))
            outputs.append(ExpertOutput(rows=rows, gates=called.gates, velocity=velocity))
            routing.calls.experts[k] += len(rows)
        return combine_velocities(noised, outputs)

    def initial_latents(self, noise: NoiseSource, condition: Condition, routing: RoutingState) -> Latents:
        """Return noise, or for experts with a draft the draft of an expert drawn from the prior for each row."""
        latents = scale_initial_noise(noise(0), self.few_step, self.noise_schedule)
        experts = {k: expert for k, expert in sorted(self.experts.items()) if expert.has_draft}
        if not experts:
            return latents
        prior = RoutingState.from_prior(routing.seeds, self._prior_logits(condition), SelectionConfig(name="sticky"))
        gates = prior.gates if routing.state.gates is None else routing.state.gates
        for k, expert in experts.items():
            rows = gates[:, k].nonzero().squeeze(-1)
            if len(rows):
                draft = expert.initial_latents(
                    _select_rows(noise, rows), condition.rows(rows), self.noise_schedule, routing.cache_for(k)
                )
                latents = latents.index_copy(0, rows, draft.to(latents.dtype))
        return latents

    def _present(self, device: torch.device) -> Bool[Tensor, " expert"]:
        return torch.tensor([k in self.experts for k in range(self.num_experts)], device=device)

    def _logits(self, noised: Latents, t: RowTimes, condition: Condition) -> Logits:
        """Return the router's logits, -inf for missing experts; without a router, 0 for the only expert."""
        if self.router is None:
            return noised.new_zeros(len(noised), 1)
        logits = self.router.logits(noised, t, condition)
        return logits.masked_fill(~self._present(logits.device), -torch.inf)

    def _prior_logits(self, condition: Condition) -> Logits:
        """Return the prior's logits, -inf for missing experts; without a router, 0 for the only expert."""
        if self.router is None:
            return torch.zeros(len(condition), 1, device=condition.class_id.device)
        return self.router.prior_logits(condition, self._present(condition.class_id.device))


def _select_rows(noise: NoiseSource, rows: Int[Tensor, " row"]) -> NoiseSource:
    return lambda index: noise(index)[rows]


def _row_means(t: Times) -> RowTimes:
    """Return the mean of t over each row, which is the t that the router receives."""
    return t if t.ndim == 1 else t.flatten(1).mean(1)
