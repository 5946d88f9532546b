"""Base class of every kind of expert: what an ensemble needs, with the defaults of a plain velocity network.

A new kind of expert is one subclass and, if it has a folder of its own, one row of
`ensemble.expert_registry.EXPERT_KINDS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor, nn

from experts.compressed.caching.feature_cache import ExpertCache
from experts.conditions.condition import Condition
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import NoiseSchedule
from experts.training.flops import forward_flops
from experts.types import Latents, NoiseSource


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFlops:
    """FLOPs of calling an expert on one row."""

    networks: Mapping[str, float]
    """Of each network, by the suffix of its cache's name: "" for a single network, "/0" for the part "0"."""
    mean: float
    """Of one velocity at a uniformly random t."""

    @classmethod
    def from_parts(cls, parts: Mapping[str, "CallFlops"], shares: Mapping[str, float]) -> "CallFlops":
        """Combine parts; `shares` is the fraction of velocity calls that each part receives, 0 where absent."""
        return cls(
            networks={f"/{part}{name}": cost for part, flops in parts.items() for name, cost in flops.networks.items()},
            mean=sum(share * parts[part].mean for part, share in shares.items()),
        )


class ExpertModel(ABC):
    """A velocity field that an ensemble can sample, move and save."""

    __slots__ = ()

    if TYPE_CHECKING:  # at run time a property here would become the default of a subclass's dataclass field

        @property
        def latent_shape(self) -> tuple[int, ...]:
            """Return the shape of one latent."""

        @property
        def num_classes(self) -> int:
            """Return the number of classes; 0 is unconditional."""

    @property
    def few_step(self) -> FewStepSchedule | None:
        """Return the few t at which it may be evaluated, or None for any t."""
        return None

    @property
    def needs_cache(self) -> bool:
        """Return whether it reads `cached_velocity`'s cache: it skips modules, or has networks counted apart."""
        return False

    @property
    def guides_in_one_call(self) -> bool:
        """Return whether one call follows the guidance of a condition."""
        parts = self.parts().values()
        return bool(parts) and all(part.guides_in_one_call for part in parts)

    @property
    def has_draft(self) -> bool:
        """Return whether its trajectories start from `initial_latents` instead of noise."""
        return False

    @property
    def takes_any_t(self) -> bool:
        """Return whether its velocity can be evaluated at any t, outside a trajectory."""
        skips = len([*self.networks(with_cache=False)]) < len([*self.networks()])
        return self.few_step is None and not self.has_draft and not skips

    @abstractmethod
    def velocity(self, noised: Latents, t: Tensor, condition: Condition, noise_schedule: NoiseSchedule) -> Latents:
        """Return the velocity of every row on `noise_schedule`."""

    def cached_velocity(
        self,
        noised: Latents,
        t: Tensor,
        condition: Condition,
        noise_schedule: NoiseSchedule,
        rows: Int[Tensor, " row"],
        cache: ExpertCache,
    ) -> Latents:
        """Return the velocity of these rows of a trajectory, and count the calls in its cache."""
        cache.count(float(len(rows)))
        return self.velocity(noised, t, condition, noise_schedule)

    def initial_latents(
        self, noise: NoiseSource, condition: Condition, noise_schedule: NoiseSchedule, cache: ExpertCache
    ) -> Latents:
        """Return noised samples at the first t of the few-step schedule; called only where `has_draft` is true."""
        raise NotImplementedError(f"{type(self).__name__} has no draft; start its trajectories from noise")

    def parts(self) -> Mapping[str, "ExpertModel"]:
        """Return the experts that it consists of, by the names of their caches; empty for a single network."""
        return {}

    def with_parts(self, parts: Mapping[str, "ExpertModel"]) -> "ExpertModel":
        """Return a copy with these parts replaced."""
        raise NotImplementedError(f"{type(self).__name__} has no parts; got {sorted(parts)}")

    def networks(self, *, with_cache: bool = True) -> Iterator[nn.Module]:
        """Yield its networks; with `with_cache` false, those without a cache schedule only."""
        for part in self.parts().values():
            yield from part.networks(with_cache=with_cache)

    def call_flops(self, noise_schedule: NoiseSchedule) -> CallFlops:
        """Count the FLOPs of its networks on one row on the CPU, without those of rebuilding shared weights."""
        row, t, condition = torch.zeros(1, *self.latent_shape), torch.full((1,), 0.5), Condition.null(1)
        if self.guides_in_one_call:
            condition = condition.guided(2.0)
        velocity = partial(self.velocity, row, t, condition, noise_schedule)
        with torch.no_grad():
            velocity()  # shared weights are kept from here on
        flops = forward_flops(velocity)
        return CallFlops(networks={"": flops}, mean=flops)

    @abstractmethod
    def to(self, device: torch.device | str) -> "ExpertModel":
        """Move its networks to a device, in place."""

    def folder_name(self, expert_id: int) -> str:
        """Return the name of its folder in a pipeline; experts that share a folder return the same name."""
        return f"expert_{expert_id}"

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the expert's folder."""
