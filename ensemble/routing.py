"""What one trajectory remembers: its seeds, the experts it is pinned to, the calls it has made.

Draws are a hash of (seed, t, draw), so they need no state and do not depend on the batch.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, UInt64
from torch import Tensor

from router.config import SelectionConfig

Gates = Float[Tensor, "batch expert"]
Times = Float[Tensor, " batch"]

TIME_LEVELS = 2**20
"""Two values of t that round to the same level share their draws."""
BEFORE_THE_FIRST_STEP = TIME_LEVELS + 1
"""The level of what is drawn once a trajectory."""


@dataclass(slots=True, kw_only=True)
class Calls:
    """Rows that were put through networks so far."""

    experts: Counter[int] = field(default_factory=Counter)
    """By the experts' ids."""
    router: int = 0
    evaluations: int = 0
    """Of the velocity; Heun makes two in most of its steps."""

    @property
    def per_evaluation(self) -> float:
        """Expert calls of one image in one evaluation: 1 for sticky, K for full, twice that with guidance."""
        return self.experts.total() / self.evaluations

    def add(self, other: "Calls") -> None:
        """Count the calls of another trajectory too."""
        self.experts.update(other.experts)
        self.router += other.router
        self.evaluations += other.evaluations


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """The state of one trajectory of a batch; made by `Ensemble.begin`."""

    seeds: tuple[int, ...]
    selection: SelectionConfig
    pinned: Gates | None = None
    """Gates that were chosen before the first step and are kept to the last."""
    calls: Calls = field(default_factory=Calls)

    def repeated(self, times: int) -> "Routing":
        """The same trajectories `times` times in one batch; calls are counted together."""
        pinned = None if self.pinned is None else self.pinned.repeat(times, 1)
        return replace(self, seeds=self.seeds * times, pinned=pinned)


def uniforms_at(seeds: Sequence[int], t: Times, draws: int) -> Float[Tensor, "batch draw"]:
    """Numbers in [0, 1); row i is a function of `seeds[i]` and `t[i]` alone."""
    levels = (t.detach().double() * TIME_LEVELS).round().long().cpu().numpy()
    return torch.from_numpy(_hashed(seeds, levels.astype(np.uint64), draws)).to(t.device)


def uniforms_once(seeds: Sequence[int], draws: int) -> Float[Tensor, "batch draw"]:
    """Numbers in [0, 1) for what is drawn once a trajectory; row i is a function of `seeds[i]` alone."""
    levels = np.full(len(seeds), BEFORE_THE_FIRST_STEP, np.uint64)
    return torch.from_numpy(_hashed(seeds, levels, draws))


def _hashed(seeds: Sequence[int], levels: UInt64[np.ndarray, " batch"], draws: int) -> Float[np.ndarray, "batch draw"]:
    rows = _scrambled(np.array([seed % 2**64 for seed in seeds], np.uint64))
    cells = _scrambled(rows ^ _scrambled(levels))[:, None] + np.arange(draws, dtype=np.uint64)
    top_bits = _scrambled(cells) >> np.uint64(11)
    numbers: Float[np.ndarray, "batch draw"] = np.divide(top_bits, 2.0**53)
    return numbers


def _scrambled(state: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """One step of SplitMix64 (Steele et al. 2014, doi:10.1145/2660193.2660195, figure 16)."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return state
