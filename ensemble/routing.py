"""State of one batch of trajectories: seeds, the gates of the last evaluation, call counts, feature caches.

Random numbers are a hash of the seed and of the event that needs them: t, or the number of earlier evaluations. They
do not depend on the batch.
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
from experts.types import RowIds
from router.config import SelectionConfig
from router.selection import Selection, get_selection, maximal_coupling, never, sample

Gates = Float[Tensor, "batch expert"]
Logits = Float[Tensor, "batch expert"]
Times = Float[Tensor, " batch"]
Uniforms = Float[Tensor, "batch draw"]

TIME_LEVELS = 2**20
"""Two values of t that round to the same level share their random numbers."""
INITIAL_LEVEL = TIME_LEVELS + 1
"""Level of the draws from the prior; higher levels belong to later draws that are not tied to a t."""


@dataclass(slots=True, kw_only=True)
class CallCounts:
    """Rows that networks were evaluated on so far."""

    experts: Counter[int] = field(default_factory=Counter)
    """By the experts' ids."""
    full_calls: dict[str, float] = field(default_factory=dict)
    """By network, `3` or `3/0` if expert 3 has several: in full calls, of which a feature cache makes fractions."""
    router: int = 0
    evaluations: int = 0
    """Of the velocity by the solver; Heun makes two in most of its steps, reflection adds none."""
    weak: "CallCounts | None" = None
    """Of the weak ensemble of a reflection."""

    @property
    def per_evaluation(self) -> float:
        """Return the expert calls per image and evaluation: 1 for sticky, K for full, twice that with guidance.

        Calls of a reflection are included, those of its weak ensemble too.
        """
        weak = 0 if self.weak is None else self.weak.experts.total()
        return (self.experts.total() + weak) / self.evaluations

    def add(self, other: "CallCounts") -> None:
        """Add the calls of another batch of trajectories."""
        self.experts.update(other.experts)
        for name, calls in other.full_calls.items():
            self.full_calls[name] = self.full_calls.get(name, 0.0) + calls
        self.router += other.router
        self.evaluations += other.evaluations
        if other.weak is not None:
            self.weak = self.weak or CallCounts()
            self.weak.add(other.weak)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRows:
    """The rows that an expert is called on, and its gate in each of them."""

    expert_id: int
    rows: RowIds
    gates: Float[Tensor, " row"]


@dataclass(slots=True, kw_only=True)
class TrajectoryState:
    """What a selection needs from earlier evaluations, one row per trajectory and branch."""

    gates: Gates | None = None
    """Of the last evaluation; initially those drawn from the prior, or None."""
    probability: Gates | None = None
    """The posterior that they were drawn from."""
    is_frozen: Bool[Tensor, " batch"] | None = None
    """Whether the gates stay fixed until t = 0."""
    evaluations: int = 0
    """Number of evaluations so far."""
    found: tuple[Gates, Sequence[ExpertRows]] | None = None
    """The last gates whose rows were looked for, and these rows."""

    def repeat(self, times: int) -> "TrajectoryState":
        """Return `times` branches with equal states, which evolve independently."""
        return TrajectoryState(
            gates=None if self.gates is None else self.gates.repeat(times, 1),
            probability=None if self.probability is None else self.probability.repeat(times, 1),
            is_frozen=None if self.is_frozen is None else self.is_frozen.repeat(times),
            evaluations=self.evaluations,
        )

    def rows(self, index: RowIds) -> "TrajectoryState":
        """Return the state of these rows."""
        return TrajectoryState(
            gates=None if self.gates is None else self.gates[index],
            probability=None if self.probability is None else self.probability[index],
            is_frozen=None if self.is_frozen is None else self.is_frozen[index],
            evaluations=self.evaluations,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingState:
    """The state of one batch of trajectories; `Ensemble.init_routing` creates it."""

    seeds: tuple[int, ...]
    selection: SelectionConfig
    branches: int = 1
    """Equal parts of the rows with the same seeds; the first part has the condition."""
    state: TrajectoryState = field(default_factory=TrajectoryState)
    calls: CallCounts = field(default_factory=CallCounts)
    caches: dict[int, ExpertCache] = field(default_factory=dict)
    """Cached features of each expert."""

    @classmethod
    def from_prior(cls, seeds: Sequence[int], prior: Logits, selection: SelectionConfig) -> "RoutingState":
        """Start trajectories, each with one expert drawn from the prior."""
        start, uniforms = torch.ones(len(prior), device=prior.device), occasion_uniforms(seeds, 1).to(prior.device)
        state = TrajectoryState(gates=sample(prior, start, uniforms, selection), probability=prior.softmax(-1))
        return cls(seeds=tuple(seeds), selection=selection, state=state)

    def cache_for(self, k: int) -> ExpertCache:
        """Return the feature cache of an expert, created on first use."""
        return self.caches.setdefault(k, ExpertCache(name=str(k), work=self.calls.full_calls))

    def repeat(self, times: int) -> "RoutingState":
        """Return the trajectories in `times` branches of one batch; calls are counted together."""
        state = self.state.repeat(times)
        return replace(self, seeds=self.seeds * times, branches=self.branches * times, state=state, caches={})

    def rows(self, index: RowIds) -> "RoutingState":
        """Return new trajectories of these rows, which have no branches yet, with calls and caches of their own."""
        seeds = tuple(self.seeds[row] for row in index.tolist())
        return RoutingState(seeds=seeds, selection=self.selection, state=self.state.rows(index))

    @property
    def gates(self) -> Gates:
        """Return the gates of the last evaluation or of the prior; raise `ValueError` if there are none yet."""
        if self.state.gates is None:
            raise ValueError("gates exist after a draw from the prior or an evaluation; call `update_gates` first")
        return self.state.gates

    def fixed_gates(self, t: Times) -> Gates | None:
        """Return the gates if they stay fixed in every row, so that no router call is needed; else None."""
        gates = self.state.gates
        if gates is None or get_selection(self.selection).queries_router is never:
            return gates
        return gates if self._keeps_gates(t).all() else None

    def expert_rows(self, gates: Gates) -> Sequence[ExpertRows]:
        """Return the rows of every expert with a positive gate; those of gates that stay are looked for once."""
        found = self.state.found
        if found is None or found[0] is not gates:
            found = self.state.found = gates, find_expert_rows(gates)
        return found[1]

    def update_gates(self, logits: Logits, t: Times) -> Gates:
        """Compute the gates of this evaluation from the router's logits and the state."""
        rule, state = get_selection(self.selection), self.state
        conditional_logits = logits[: len(logits) // self.branches].repeat(self.branches, 1)
        is_shared = rule.shares_expert_across_guidance(t, self.selection).unsqueeze(-1)
        logits = torch.where(is_shared, conditional_logits, logits)
        probability = logits.softmax(-1)
        if rule.is_chain and state.gates is not None and state.probability is not None:
            logits = maximal_coupling(state.probability, state.gates, probability).log()
        gates = rule.gates(logits, t, self._uniforms(rule, t), self.selection)
        keeps_gates = self._keeps_gates(t)
        if state.gates is not None:
            gates = torch.where(keeps_gates.unsqueeze(-1), state.gates.to(gates), gates)
        state.gates, state.probability = gates.detach(), probability.detach()
        state.is_frozen = self._is_frozen(t) | rule.freezes_gates(t, self.selection)
        state.evaluations += 1
        return gates

    def _keeps_gates(self, t: Times) -> Bool[Tensor, " batch"]:
        return self._is_frozen(t) | ~get_selection(self.selection).queries_router(t, self.selection)

    def _is_frozen(self, t: Times) -> Bool[Tensor, " batch"]:
        is_frozen = self.state.is_frozen
        return torch.zeros_like(t, dtype=torch.bool) if is_frozen is None else is_frozen

    def _uniforms(self, rule: Selection, t: Times) -> Uniforms:
        draws = rule.draws(self.selection)
        if rule.draw_key == "t":
            return time_uniforms(self.seeds, t, draws)
        occasion = 1 if rule.draw_key == "trajectory" else 1 + self.state.evaluations
        return occasion_uniforms(self.seeds, draws, occasion).to(t.device)


def called_experts(gates: Gates) -> list[int]:
    """Return the ids of the experts with a positive gate in any row."""
    ids: list[int] = (gates > 0).any(0).nonzero().squeeze(-1).tolist()
    return ids


def find_expert_rows(gates: Gates) -> Sequence[ExpertRows]:
    """Return the rows of every expert with a positive gate in any of them."""
    rows = {k: gates[:, k].nonzero().squeeze(-1) for k in called_experts(gates)}
    return [ExpertRows(expert_id=k, rows=index, gates=gates[index, k]) for k, index in rows.items()]


def time_uniforms(seeds: Sequence[int], t: Times, draws: int) -> Float[Tensor, "batch draw"]:
    """Return numbers in [0, 1); row i depends on `seeds[i]` and `t[i]` alone."""
    levels = (t.detach().double() * TIME_LEVELS).round().long().cpu().numpy()
    return torch.from_numpy(hash_uniforms(seeds, levels.astype(np.uint64), draws)).to(t.device)


def occasion_uniforms(seeds: Sequence[int], draws: int, occasion: int = 0) -> Float[Tensor, "batch draw"]:
    """Return numbers in [0, 1) that are drawn once per occasion; row i depends on `seeds[i]` and `occasion` alone."""
    levels = np.full(len(seeds), INITIAL_LEVEL + occasion, np.uint64)
    return torch.from_numpy(hash_uniforms(seeds, levels, draws))


def hash_uniforms(
    seeds: Sequence[int], levels: UInt64[np.ndarray, " batch"], draws: int
) -> Float[np.ndarray, "batch draw"]:
    """Hash each pair of a seed and a level to `draws` numbers in [0, 1)."""
    rows = splitmix64(np.array([seed % 2**64 for seed in seeds], np.uint64))
    cells = splitmix64(rows ^ splitmix64(levels))[:, None] + np.arange(draws, dtype=np.uint64)
    top_bits = splitmix64(cells) >> np.uint64(11)
    numbers: Float[np.ndarray, "batch draw"] = np.divide(top_bits, 2.0**53)
    return numbers


def splitmix64(state: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """Return one step of SplitMix64 (Steele et al. 2014, doi:10.1145/2660193.2660195, figure 16)."""
    return splitmix64_finalize(state + np.uint64(0x9E3779B97F4A7C15))
