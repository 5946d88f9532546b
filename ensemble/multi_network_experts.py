"""Experts of several networks: a draft that is refined, and networks that divide [0, 1] by t.

expert_k/truncated.json    the kind of draft
expert_k/draft             the generator of clean latents: a few-step expert, or one of `draft_generators`
expert_k/refiner           the expert, with a few-step schedule that starts below t = 1

expert_k/time_split.json   the t at which each network hands over to the next
expert_k/0 ...             the networks, from t = 0 to t = 1

Truncated diffusion, as in CAT-DM (Zeng et al. 2024, arXiv:2311.18405): x = alpha(t) draft + sigma(t) noise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ddm_core.artifacts import CorruptArtifact, read_json, write_json
from ddm_core.json_values import from_json
from ensemble.solvers import sample_few_step, scale_initial_noise
from experts.architectures.draft_generators import DRAFT_GENERATORS
from experts.compressed.caching.feature_cache import ExpertCache
from experts.conditions.condition import Condition
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import NoiseSchedule
from experts.expert import Expert
from experts.expert_model import CallFlops, ExpertModel
from experts.networks.model_io import load_model, save_model
from experts.training.flops import forward_flops
from experts.types import Latents, NoiseSource

TRUNCATED = "truncated.json"
DRAFT_NOISE_INDEX = 1000
"""Indices of a draft's noise start here, above those of the refiner's steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TruncatedExpert(ExpertModel):
    """A draft and its refiner: trajectories start from the noised draft, and the velocity is the refiner's."""

    draft: Expert | nn.Module
    """An expert, sampled by its few-step schedule or in one step, or a network (noise, class index) -> clean."""
    refiner: Expert
    """Its few-step schedule starts at the t to which drafts are noised."""

    def __post_init__(self) -> None:
        """Raise `ValueError` if the refiner has no few-step schedule."""
        if self.refiner.few_step is None:
            raise ValueError(
                "a truncated expert needs a refiner with a few-step schedule; got one without: set `few_step` to a "
                "schedule that starts at the t to which drafts are noised"
            )

    @property
    def few_step(self) -> FewStepSchedule | None:
        """Return the refiner's few-step schedule."""
        return self.refiner.few_step

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return the shape of one latent."""
        return self.refiner.latent_shape

    @property
    def num_classes(self) -> int:
        """Return the number of classes; 0 is unconditional."""
        return self.refiner.num_classes

    @property
    def needs_cache(self) -> bool:
        """Return true: calls of draft and refiner are counted apart."""
        return True

    @property
    def has_draft(self) -> bool:
        """Return true."""
        return True

    def velocity(self, noised: Latents, t: Tensor, condition: Condition, noise_schedule: NoiseSchedule) -> Latents:
        """Return the refiner's velocity."""
        return self.refiner.velocity(noised, t, condition, noise_schedule)

    def cached_velocity(
        self,
        noised: Latents,
        t: Tensor,
        condition: Condition,
        noise_schedule: NoiseSchedule,
        rows: Int[Tensor, " row"],
        cache: ExpertCache,
    ) -> Latents:
        """Return the refiner's velocity with the cached features of these rows of the trajectory."""
        return self.refiner.cached_velocity(noised, t, condition, noise_schedule, rows, cache.child("refiner"))

    def initial_latents(
        self, noise: NoiseSource, condition: Condition, noise_schedule: NoiseSchedule, cache: ExpertCache
    ) -> Latents:
        """Return drafts, noised to the first t of the refiner's few-step schedule."""
        start = self.refiner.few_step.times[0] if self.refiner.few_step else 1.0
        clean = self.sample_draft(noise, condition, cache.child("draft"))
        return noise_schedule.add_noise(clean, noise(0), clean.new_full((len(clean),), start))

    def sample_draft(self, noise: NoiseSource, condition: Condition, cache: ExpertCache) -> Latents:
        """Sample clean drafts."""
        draft_noise, draft = noise(DRAFT_NOISE_INDEX), self.draft
        if not isinstance(draft, Expert):
            cache.count(float(len(draft_noise)))
            clean: Latents = draft(draft_noise, condition.embedding_index(self.num_classes))
            return clean
        few_step = draft.few_step or FewStepSchedule.uniform(1, "euler")
        cache.count(float(len(draft_noise) * len(few_step.times)))

        def velocity(noised: Latents, t: Tensor) -> Latents:
            return draft.velocity(noised, t, condition)

        initial = scale_initial_noise(draft_noise, few_step, draft.noise_schedule)
        return sample_few_step(
            velocity, initial, few_step, draft.noise_schedule, lambda step: noise(DRAFT_NOISE_INDEX + 1 + step)
        )

    def parts(self) -> Mapping[str, Expert]:
        """Return the refiner, and the draft if it is an expert."""
        draft = {"draft": self.draft} if isinstance(self.draft, Expert) else {}
        return {"refiner": self.refiner} | draft

    def with_parts(self, parts: Mapping[str, Any]) -> "TruncatedExpert":
        """Return a copy with this refiner, and with this draft if there is one in `parts`."""
        return replace(self, **parts)

    def call_flops(self, noise_schedule: NoiseSchedule) -> CallFlops:
        """Count the FLOPs of refiner and draft on one row; a velocity calls the refiner alone."""
        flops = {name: part.call_flops(noise_schedule) for name, part in self.parts().items()}
        if not isinstance(self.draft, Expert):
            noise, index = torch.zeros(1, *self.latent_shape), Condition.null(1).embedding_index(self.num_classes)
            draft = forward_flops(partial(self.draft, noise, index))
            flops["draft"] = CallFlops(networks={"": draft}, mean=draft)
        return CallFlops.from_parts(flops, {"refiner": 1.0})

    def to(self, device: torch.device | str) -> "TruncatedExpert":
        """Move both networks to a device, in place."""
        self.draft.to(device)
        self.refiner.to(device)
        return self

    def save(self, folder: Path) -> None:
        """Write both networks and `truncated.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.draft, Expert):
            draft_kind = "expert"
            self.draft.save(folder / "draft")
        else:
            draft_kind = type(self.draft).__name__
            save_model(self.draft, folder / "draft")
        self.refiner.save(folder / "refiner")
        write_json(folder / TRUNCATED, {"draft": draft_kind})

    @classmethod
    def load(cls, folder: Path) -> "TruncatedExpert":
        """Read what `save` wrote; raises an `ArtifactError` if a file is missing or broken."""
        description = read_json(folder / TRUNCATED)
        try:
            is_expert = description["draft"] == "expert"
            draft = Expert.load(folder / "draft") if is_expert else load_model(DRAFT_GENERATORS, folder / "draft")
            return cls(draft=draft, refiner=Expert.load(folder / "refiner"))
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptArtifact(
                f"{folder / TRUNCATED} does not describe a draft and its refiner: {error}; make the ensemble again"
            ) from error


TIME_SPLIT = "time_split.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSplitExpert(ExpertModel):
    """Several networks that divide [0, 1]; the t of a row selects the network that computes its velocity."""

    experts: Sequence[Expert]
    """From t = 0 to t = 1."""
    bounds: Sequence[float]
    """The t at which each network but the last hands over to the next; at a bound the later one is called."""
    few_step: FewStepSchedule | None = None
    """The few t at which it may be evaluated; None is any t."""
    guidance: float = 1.0
    """Guidance scale of the last network, the one of the noisiest t; 1 is none."""

    def __post_init__(self) -> None:
        """Raise `ValueError` if the bounds do not divide [0, 1] into one interval per network."""
        times = [0.0, *self.bounds, 1.0]
        if len(self.experts) != len(self.bounds) + 1 or any(low >= high for low, high in pairwise(times)):
            raise ValueError(
                f"{len(self.experts)} networks need one bound less, rising between 0 and 1; got {list(self.bounds)}; "
                "give one increasing bound between each two networks"
            )

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return the shape of one latent."""
        return self.experts[0].latent_shape

    @property
    def num_classes(self) -> int:
        """Return the number of classes; 0 is unconditional."""
        return self.experts[0].num_classes

    @property
    def widths(self) -> list[float]:
        """Return the length of every network's interval."""
        return [high - low for low, high in pairwise([0.0, *self.bounds, 1.0])]

    @property
    def needs_cache(self) -> bool:
        """Return true: calls of the networks are counted apart."""
        return True

    def velocity(self, noised: Latents, t: Tensor, condition: Condition, noise_schedule: NoiseSchedule) -> Latents:
        """Return the velocity; each network is called on the rows of its interval, if there are any."""
        rows = torch.arange(len(noised), device=noised.device)
        return self.cached_velocity(noised, t, condition, noise_schedule, rows, ExpertCache(name=""))

    def cached_velocity(
        self,
        noised: Latents,
        t: Tensor,
        condition: Condition,
        noise_schedule: NoiseSchedule,
        rows: Int[Tensor, " row"],
        cache: ExpertCache,
    ) -> Latents:
        """Return the velocity with the cached features that these rows of the trajectory have of each network."""
        bounds = torch.tensor(self.bounds, dtype=t.dtype, device=t.device)
        interval = torch.bucketize(t.contiguous(), bounds, right=True)
        velocity = torch.zeros_like(noised)
        for number, expert in enumerate(self.experts):
            places = (interval == number).nonzero().squeeze(-1)
            if len(places):
                inputs = noised[places], t[places], condition.rows(places), noise_schedule, rows[places]
                part = expert.cached_velocity(*inputs, cache.child(str(number)))
                if self.guidance != 1 and expert is self.experts[-1]:
                    inputs = (*inputs[:2], Condition.null(len(places), noised.device), *inputs[3:])
                    null = expert.cached_velocity(*inputs, cache.child(str(number)))
                    part = null + self.guidance * (part - null)
                velocity = velocity.index_copy(0, places, part.to(velocity.dtype))
        return velocity

    def parts(self) -> Mapping[str, Expert]:
        """Return the networks, named 0, 1, ... from t = 0 to t = 1."""
        return {str(number): expert for number, expert in enumerate(self.experts)}

    def with_parts(self, parts: Mapping[str, Any]) -> "TimeSplitExpert":
        """Return a copy with these networks, all of them, in their order."""
        return replace(self, experts=list(parts.values()))

    def call_flops(self, noise_schedule: NoiseSchedule) -> CallFlops:
        """Count the FLOPs of every network on one row; each is called in proportion to its interval."""
        flops = {name: part.call_flops(noise_schedule) for name, part in self.parts().items()}
        calls = [1] * (len(flops) - 1) + [1 if self.guidance == 1 else 2]
        shares = [width * count for width, count in zip(self.widths, calls, strict=True)]
        return CallFlops.from_parts(flops, dict(zip(flops, shares, strict=True)))

    def to(self, device: torch.device | str) -> "TimeSplitExpert":
        """Move the networks to a device, in place."""
        for expert in self.experts:
            expert.to(device)
        return self

    def save(self, folder: Path) -> None:
        """Write every network and `time_split.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, expert in enumerate(self.experts):
            expert.save(folder / str(number))
        few_step = {} if self.few_step is None else {"few_step": self.few_step}
        guidance = {} if self.guidance == 1 else {"guidance": self.guidance}
        write_json(folder / TIME_SPLIT, {"bounds": list(self.bounds)} | few_step | guidance)

    @classmethod
    def load(cls, folder: Path) -> "TimeSplitExpert":
        """Read what `save` wrote; raises an `ArtifactError` if a file is missing or broken."""
        description = read_json(folder / TIME_SPLIT)
        try:
            bounds = tuple(float(bound) for bound in description["bounds"])
            experts = [Expert.load(folder / str(number)) for number in range(len(bounds) + 1)]
            few_step = from_json(FewStepSchedule, description["few_step"]) if "few_step" in description else None
            guidance = float(description.get("guidance", 1.0))
            return cls(experts=experts, bounds=bounds, few_step=few_step, guidance=guidance)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptArtifact(
                f"{folder / TIME_SPLIT} does not divide [0, 1]: {error}; make the ensemble again"
            ) from error
