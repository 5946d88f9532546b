"""Experts of a draft that is refined.

expert_k/truncated.json    the kind of draft
expert_k/draft             the generator of clean latents: a few-step expert, or one of `draft_generators`
expert_k/refiner           the expert, with a few-step schedule that starts below t = 1

Truncated diffusion, as in CAT-DM (Zeng et al. 2024, arXiv:2311.18405): x = alpha(t) draft + sigma(t) noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ddm_core.artifacts import CorruptArtifact, read_json, write_json
from ensemble.solvers import sample_few_step, scale_initial_noise
from experts.architectures.draft_generators import DRAFT_GENERATORS, PromptedAnchors
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
            index = condition.embedding_index(self.num_classes)
            is_prompted = isinstance(draft, PromptedAnchors)
            clean: Latents = draft(draft_noise, index, condition.text) if is_prompted else draft(draft_noise, index)
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
