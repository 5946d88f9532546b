"""What one trajectory remembers: its seeds, which experts spoke last, the calls it has made.

Draws are a hash of the seed and of their occasion (t, or how many evaluations came before), so they do not depend on
the batch.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt64
from torch import Tensor

from ddm_core.random_bits import splitmix64_finalize
from experts.compressed.caching.feature_cache import ExpertCache
from router.config import SelectionConfig
from router.selection import Selection, get_selection, sample, sticky_resample

Gates = Float[Tensor, "batch expert"]
Logits = Float[Tensor, "batch expert"]
Times = Float[Tensor, " batch"]
Uniforms = Float[Tensor, "batch draw"]

TIME_LEVELS = 2**20
"""Two values of t that round to the same level share their draws."""
BEFORE_THE_FIRST_STEP = TIME_LEVELS + 1
"""The level of what is drawn from the prior; those above it are for what is drawn later at no certain t."""


@dataclass(slots=True, kw_only=True)
class CallCounts:
    """Rows that were put through networks so far."""

    experts: Counter[int] = field(default_factory=Counter)
    """By the experts' ids."""
    full_calls: dict[str, float] = field(default_factory=dict)
    """By network, `3` or `3/0` if expert 3 has several: the same in full calls, of which a cache makes fractions."""
    router: int = 0
    evaluations: int = 0
    """Of the velocity by the solver; Heun makes two in most of its steps, reflection adds none."""
    weak: "CallCounts | None" = None
    """Of the weak ensemble that this one was reflected against."""

    @property
    def per_evaluation(self) -> float:
        """Expert calls of one image in one evaluation: 1 for sticky, K for full, twice that with guidance.

        The calls of reflection, those of the weak ensemble among them, come on top.
        """
        weak = 0 if self.weak is None else self.weak.experts.total()
        return (self.experts.total() + weak) / self.evaluations

    def add(self, other: "CallCounts") -> None:
        """Count the calls of another trajectory too."""
        self.experts.update(other.experts)
        for name, calls in other.full_calls.items():
            self.full_calls[name] = self.full_calls.get(name, 0.0) + calls
        self.router += other.router
        self.evaluations += other.evaluations
        if other.weak is not None:
            self.weak = self.weak or CallCounts()
            self.weak.add(other.weak)


@dataclass(slots=True, kw_only=True)
class TrajectoryState:
    """What the evaluations so far have left behind, one row a trajectory and branch."""

    gates: Gates | None = None
    """Of the evaluation before; at first those that were drawn from the prior, or None."""
    probability: Gates | None = None
    """The posterior that they were drawn from."""
    is_settled: Bool[Tensor, " batch"] | None = None
    """Whether the gates are kept to the end."""
    evaluations: int = 0
    """Those so far."""

    def repeated(self, times: int) -> "TrajectoryState":
        """As many branches that remember the same, and go apart from here on."""
        return TrajectoryState(
            gates=None if self.gates is None else self.gates.repeat(times, 1),
            probability=None if self.probability is None else self.probability.repeat(times, 1),
            is_settled=None if self.is_settled is None else self.is_settled.repeat(times),
            evaluations=self.evaluations,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingState:
    """The state of one trajectory of a batch; made by `Ensemble.begin`."""

    seeds: tuple[int, ...]
    selection: SelectionConfig
    branches: int = 1
    """Equal parts of the rows that are the same trajectories; the first of them has the condition."""
    memory: TrajectoryState = field(default_factory=TrajectoryState)
    calls: CallCounts = field(default_factory=CallCounts)
    caches: dict[int, ExpertCache] = field(default_factory=dict)
    """What its samples remember of each expert."""

    @classmethod
    def from_prior(cls, seeds: Sequence[int], prior: Logits, selection: SelectionConfig) -> "RoutingState":
        """New trajectories, each with one expert drawn from the prior."""
        start, uniforms = torch.ones(len(prior), device=prior.device), uniforms_once(seeds, 1).to(prior.device)
        memory = TrajectoryState(gates=sample(prior, start, uniforms, selection), probability=prior.softmax(-1))
        return cls(seeds=tuple(seeds), selection=selection, memory=memory)

    def cache_for(self, k: int) -> ExpertCache:
        """What these trajectories remember of an expert."""
        return self.caches.setdefault(k, ExpertCache(name=str(k), work=self.calls.full_calls))

    def repeated(self, times: int) -> "RoutingState":
        """The same trajectories in `times` branches of one batch; calls are counted together."""
        memory = self.memory.repeated(times)
        return replace(self, seeds=self.seeds * times, branches=self.branches * times, memory=memory, caches={})

    @property
    def gates(self) -> Gates:
        """Those of the evaluation before, or of the opening; `ValueError` if there are none yet."""
        if self.memory.gates is None:
            raise ValueError("these trajectories have not been opened")
        return self.memory.gates

    def fixed_gates(self, t: Times) -> Gates | None:
        """The gates if they stay as they are in every row, so that nobody need ask the router; else None."""
        return self.memory.gates if self.memory.gates is not None and self._stays(t).all() else None

    def update_gates(self, logits: Logits, t: Times) -> Gates:
        """The gates of this evaluation, from the router's logits and what is remembered."""
        rule, memory = get_selection(self.selection), self.memory
        of_condition = logits[: len(logits) // self.branches].repeat(self.branches, 1)
        shared = rule.shares_expert_across_guidance(t, self.selection).unsqueeze(-1)
        logits = torch.where(shared, of_condition, logits)
        probability = logits.softmax(-1)
        if rule.is_chain and memory.gates is not None and memory.probability is not None:
            logits = sticky_resample(memory.probability, memory.gates, probability).log()
        gates = rule.gates(logits, t, self._uniforms(rule, t), self.selection)
        stays = self._stays(t)
        if memory.gates is not None:
            gates = torch.where(stays.unsqueeze(-1), memory.gates.to(gates), gates)
        memory.gates, memory.probability = gates.detach(), probability.detach()
        memory.is_settled = self._was_settled(t) | rule.freezes_gates(t, self.selection)
        memory.evaluations += 1
        return gates

    def _stays(self, t: Times) -> Bool[Tensor, " batch"]:
        return self._was_settled(t) | ~get_selection(self.selection).queries_router(t, self.selection)

    def _was_settled(self, t: Times) -> Bool[Tensor, " batch"]:
        settled = self.memory.is_settled
        return torch.zeros_like(t, dtype=torch.bool) if settled is None else settled

    def _uniforms(self, rule: Selection, t: Times) -> Uniforms:
        draws = rule.draws(self.selection)
        if rule.draw_key == "t":
            return uniforms_at(self.seeds, t, draws)
        occasion = 1 if rule.draw_key == "trajectory" else 1 + self.memory.evaluations
        return uniforms_once(self.seeds, draws, occasion).to(t.device)


def uniforms_at(seeds: Sequence[int], t: Times, draws: int) -> Float[Tensor, "batch draw"]:
    """Numbers in [0, 1); row i is a function of `seeds[i]` and `t[i]` alone."""
    levels = (t.detach().double() * TIME_LEVELS).round().long().cpu().numpy()
    return torch.from_numpy(hash_uniforms(seeds, levels.astype(np.uint64), draws)).to(t.device)


def uniforms_once(seeds: Sequence[int], draws: int, occasion: int = 0) -> Float[Tensor, "batch draw"]:
    """Numbers in [0, 1) for what is drawn once a trajectory, or once an occasion; row i depends on `seeds[i]` alone."""
    levels = np.full(len(seeds), BEFORE_THE_FIRST_STEP + occasion, np.uint64)
    return torch.from_numpy(hash_uniforms(seeds, levels, draws))


def hash_uniforms(
    seeds: Sequence[int], levels: UInt64[np.ndarray, " batch"], draws: int
) -> Float[np.ndarray, "batch draw"]:
    rows = splitmix64(np.array([seed % 2**64 for seed in seeds], np.uint64))
    cells = splitmix64(rows ^ splitmix64(levels))[:, None] + np.arange(draws, dtype=np.uint64)
    top_bits = splitmix64(cells) >> np.uint64(11)
    numbers: Float[np.ndarray, "batch draw"] = np.divide(top_bits, 2.0**53)
    return numbers


def splitmix64(state: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """One step of SplitMix64 (Steele et al. 2014, doi:10.1145/2660193.2660195, figure 16)."""
    return splitmix64_finalize(state + np.uint64(0x9E3779B97F4A7C15))
