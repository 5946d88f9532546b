"""An expert whose samples begin with a draft, which is noised to some t below 1 and refined from there.

expert_k/truncated.json    which kind of draft it is
expert_k/draft           the generator of clean latents: an expert with its own course, or one of `draft_generators`
expert_k/refiner         the expert, with the course that begins at that t

Truncated diffusion, as in CAT-DM (Zeng et al. 2024, arXiv:2311.18405): x = alpha(t) draft + sigma(t) noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ddm_core.artifacts import CorruptArtifact, read_json, write_json
from ensemble.solvers import sample_few_step, scale_initial_noise
from experts.architectures.draft_generators import DRAFTS
from experts.compressed.caching.feature_cache import ExpertCache, Rows
from experts.condition import Condition
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import Latents, NoiseSchedule, NoiseSource
from experts.expert import Expert
from experts.networks.model_io import load_model, save_model

TRUNCATED = "truncated.json"
OF_DRAFT = 1000
"""What a draft is drawn from has occasions from here on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TruncatedExpert:
    """One expert to the ensemble: its velocity is the refiner's."""

    draft: Expert | nn.Module
    """An expert, asked at its course or once, or a network (noise, class index) -> clean."""
    refiner: Expert
    """Its course begins where drafts are noised to."""

    def __post_init__(self) -> None:
        """Refuse what has no beginning."""
        if self.refiner.few_step is None:
            raise ValueError("a drafted expert needs a course for its refiner, from where drafts are noised to")

    @property
    def few_step(self) -> FewStepSchedule | None:
        """The refiner's."""
        return self.refiner.few_step

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent."""
        return self.refiner.latent_shape

    @property
    def num_classes(self) -> int:
        """0 is unconditional."""
        return self.refiner.num_classes

    def velocity(self, noised: Latents, t: Tensor, condition: Condition, path: NoiseSchedule) -> Latents:
        """The refiner's."""
        return self.refiner.velocity(noised, t, condition, path)

    def create_cache(
        self,
        noised: Latents,
        t: Tensor,
        condition: Condition,
        path: NoiseSchedule,
        rows: Int[Tensor, " row"],
        kept: ExpertCache,
    ) -> Latents:
        """The same with what these rows of the trajectory have kept."""
        return self.refiner.create_cache(noised, t, condition, path, rows, kept.part("refiner"))

    def initial_latents(
        self, noise: NoiseSource, condition: Condition, path: NoiseSchedule, kept: ExpertCache
    ) -> Latents:
        """Drafts, noised to the first t of the course."""
        start = self.refiner.few_step.times[0] if self.refiner.few_step else 1.0
        clean = self.sample_draft(noise, condition, kept.part("draft"))
        return path.add_noise(clean, noise(0), clean.new_full((len(clean),), start))

    def sample_draft(self, noise: NoiseSource, condition: Condition, kept: ExpertCache) -> Latents:
        """Clean drafts."""
        own, draft = noise(OF_DRAFT), self.draft
        if isinstance(draft, nn.Module):
            kept.count(float(len(own)))
            said: Latents = draft(own, condition.embedding_index(self.num_classes))
            return said
        course = draft.few_step or FewStepSchedule.uniform(1, "euler")
        kept.count(float(len(own) * len(course.times)))

        def velocity(noised: Latents, t: Tensor) -> Latents:
            return draft.velocity(noised, t, condition)

        begun = scale_initial_noise(own, course, draft.noise_schedule)
        return sample_few_step(velocity, begun, course, draft.noise_schedule, lambda step: noise(OF_DRAFT + 1 + step))

    def to(self, device: torch.device | str) -> "TruncatedExpert":
        """Move both networks to a device, in place."""
        self.draft.to(device)
        self.refiner.to(device)
        return self

    def save(self, folder: Path) -> None:
        """Write both, and `truncated.json` beside them."""
        folder.mkdir(parents=True, exist_ok=True)
        is_expert = isinstance(self.draft, Expert)
        if isinstance(self.draft, Expert):
            self.draft.save(folder / "draft")
        else:
            save_model(self.draft, folder / "draft")
        self.refiner.save(folder / "refiner")
        write_json(folder / TRUNCATED, {"draft": "expert" if is_expert else type(self.draft).__name__})

    @classmethod
    def load(cls, folder: Path) -> "TruncatedExpert":
        """Read what `save` wrote; raises an `ArtifactError` if a file is missing or broken."""
        found = read_json(folder / TRUNCATED)
        try:
            is_expert = found["draft"] == "expert"
            draft = Expert.load(folder / "draft") if is_expert else load_model(DRAFTS, folder / "draft")
            return cls(draft=draft, refiner=Expert.load(folder / "refiner"))
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptArtifact(f"{folder / TRUNCATED} is no draft: {error}; make the ensemble again") from error


def is_truncated(folder: Path) -> bool:
    """Whether an expert's folder holds a draft and its refiner."""
    return (folder / TRUNCATED).is_file()


TIME_SPLIT = "time_split.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSplitExpert:
    """One expert to the ensemble; which network speaks for a row is decided by its t."""

    networks: Sequence[Expert]
    """From t = 0 to t = 1."""
    bounds: Sequence[float]
    """The t where each network but the last gives way to the next; at a bound the later one speaks."""
    few_step: FewStepSchedule | None = None
    """The few t at which it is to be asked; None is any t."""

    def __post_init__(self) -> None:
        """Refuse what is no division of [0, 1]."""
        inner = [0.0, *self.bounds, 1.0]
        if len(self.networks) != len(self.bounds) + 1 or any(low >= high for low, high in pairwise(inner)):
            raise ValueError(
                f"{len(self.networks)} networks need one bound less, rising between 0 and 1; got {list(self.bounds)}"
            )

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent."""
        return self.networks[0].latent_shape

    @property
    def num_classes(self) -> int:
        """0 is unconditional."""
        return self.networks[0].num_classes

    @property
    def widths(self) -> list[float]:
        """Length of every network's interval."""
        return [high - low for low, high in pairwise([0.0, *self.bounds, 1.0])]

    def velocity(self, noised: Latents, t: Tensor, condition: Condition, path: NoiseSchedule) -> Latents:
        """Each network is called on the rows of its interval, if there are any."""
        rows = torch.arange(len(noised), device=noised.device)
        return self.create_cache(noised, t, condition, path, rows, ExpertCache(name=""))

    def create_cache(
        self, noised: Latents, t: Tensor, condition: Condition, path: NoiseSchedule, rows: Rows, kept: ExpertCache
    ) -> Latents:
        """The same with what these rows of the trajectory have kept of each network."""
        index = torch.bucketize(t.contiguous(), torch.tensor(self.bounds, dtype=t.dtype, device=t.device), right=True)
        said = torch.zeros_like(noised)
        for number, expert in enumerate(self.networks):
            its = (index == number).nonzero().squeeze(-1)
            if len(its):
                own = (noised[its], t[its], condition.rows(its), path, rows[its], kept.part(str(number)))
                said = said.index_copy(0, its, expert.create_cache(*own).to(said.dtype))
        return said

    def to(self, device: torch.device | str) -> "TimeSplitExpert":
        """Move the networks to a device, in place."""
        for expert in self.networks:
            expert.to(device)
        return self

    def save(self, folder: Path) -> None:
        """Write every network, and `time_split.json` beside them."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, expert in enumerate(self.networks):
            expert.save(folder / str(number))
        course = {} if self.few_step is None else {"few_step": self.few_step.described()}
        write_json(folder / TIME_SPLIT, {"bounds": list(self.bounds)} | course)

    @classmethod
    def load(cls, folder: Path) -> "TimeSplitExpert":
        """Read what `save` wrote; raises an `ArtifactError` if a file is missing or broken."""
        found = read_json(folder / TIME_SPLIT)
        try:
            bounds = tuple(float(bound) for bound in found["bounds"])
            networks = [Expert.load(folder / str(number)) for number in range(len(bounds) + 1)]
            course = FewStepSchedule.parsed(found["few_step"]) if "few_step" in found else None
            return cls(networks=networks, bounds=bounds, few_step=course)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptArtifact(f"{folder / TIME_SPLIT} is no schedule: {error}; make the ensemble again") from error


def is_time_split(folder: Path) -> bool:
    """Whether an expert's folder holds several networks."""
    return (folder / TIME_SPLIT).is_file()
