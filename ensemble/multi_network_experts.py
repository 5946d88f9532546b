"""An expert whose samples begin with a draft, which is noised to some t below 1 and refined from there.

expert_k/drafted.json    which kind of draft it is
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
from ensemble.solvers import beginning, travel
from experts.architectures.draft_generators import DRAFTS
from experts.compressed.caching.feature_cache import Recall, Rows
from experts.condition import Condition
from experts.diffusion.few_step import Course
from experts.diffusion.noise_schedule import Latents, NoiseOf, NoisePath
from experts.expert import Expert
from experts.networks.model_io import load_model, save_model

DRAFTED = "drafted.json"
OF_DRAFT = 1000
"""What a draft is drawn from has occasions from here on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftedExpert:
    """One expert to the ensemble: its velocity is the refiner's."""

    draft: Expert | nn.Module
    """An expert, asked at its course or once, or a network (noise, class index) -> clean."""
    refiner: Expert
    """Its course begins where drafts are noised to."""

    def __post_init__(self) -> None:
        """Refuse what has no beginning."""
        if self.refiner.course is None:
            raise ValueError("a drafted expert needs a course for its refiner, from where drafts are noised to")

    @property
    def course(self) -> Course | None:
        """The refiner's."""
        return self.refiner.course

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent."""
        return self.refiner.latent_shape

    @property
    def num_classes(self) -> int:
        """0 is unconditional."""
        return self.refiner.num_classes

    def velocity(self, noised: Latents, t: Tensor, condition: Condition, path: NoisePath) -> Latents:
        """The refiner's."""
        return self.refiner.velocity(noised, t, condition, path)

    def recall(
        self,
        noised: Latents,
        t: Tensor,
        condition: Condition,
        path: NoisePath,
        rows: Int[Tensor, " row"],
        kept: Recall,
    ) -> Latents:
        """The same with what these rows of the trajectory have kept."""
        return self.refiner.recall(noised, t, condition, path, rows, kept.part("refiner"))

    def begun(self, noise: NoiseOf, condition: Condition, path: NoisePath, kept: Recall) -> Latents:
        """Drafts, noised to the first t of the course."""
        start = self.refiner.course.times[0] if self.refiner.course else 1.0
        clean = self.drawn(noise, condition, kept.part("draft"))
        return path.noised(clean, noise(0), clean.new_full((len(clean),), start))

    def drawn(self, noise: NoiseOf, condition: Condition, kept: Recall) -> Latents:
        """Clean drafts."""
        own, draft = noise(OF_DRAFT), self.draft
        if isinstance(draft, nn.Module):
            kept.count(float(len(own)))
            said: Latents = draft(own, condition.table_index(self.num_classes))
            return said
        course = draft.course or Course.even(1, "euler")
        kept.count(float(len(own) * len(course.times)))

        def velocity(noised: Latents, t: Tensor) -> Latents:
            return draft.velocity(noised, t, condition)

        begun = beginning(own, course, draft.path)
        return travel(velocity, begun, course, draft.path, lambda step: noise(OF_DRAFT + 1 + step))

    def to(self, device: torch.device | str) -> "DraftedExpert":
        """Move both networks to a device, in place."""
        self.draft.to(device)
        self.refiner.to(device)
        return self

    def save(self, folder: Path) -> None:
        """Write both, and `drafted.json` beside them."""
        folder.mkdir(parents=True, exist_ok=True)
        is_expert = isinstance(self.draft, Expert)
        if isinstance(self.draft, Expert):
            self.draft.save(folder / "draft")
        else:
            save_model(self.draft, folder / "draft")
        self.refiner.save(folder / "refiner")
        write_json(folder / DRAFTED, {"draft": "expert" if is_expert else type(self.draft).__name__})

    @classmethod
    def load(cls, folder: Path) -> "DraftedExpert":
        """Read what `save` wrote; raises an `ArtifactError` if a file is missing or broken."""
        found = read_json(folder / DRAFTED)
        try:
            is_expert = found["draft"] == "expert"
            draft = Expert.load(folder / "draft") if is_expert else load_model(DRAFTS, folder / "draft")
            return cls(draft=draft, refiner=Expert.load(folder / "refiner"))
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptArtifact(f"{folder / DRAFTED} is no draft: {error}; make the ensemble again") from error


def is_drafted(folder: Path) -> bool:
    """Whether an expert's folder holds a draft and its refiner."""
    return (folder / DRAFTED).is_file()


SCHEDULE = "schedule.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledExpert:
    """One expert to the ensemble; which network speaks for a row is decided by its t."""

    networks: Sequence[Expert]
    """From t = 0 to t = 1."""
    bounds: Sequence[float]
    """The t where each network but the last gives way to the next; at a bound the later one speaks."""
    course: Course | None = None
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

    def velocity(self, noised: Latents, t: Tensor, condition: Condition, path: NoisePath) -> Latents:
        """Each network is called on the rows of its interval, if there are any."""
        rows = torch.arange(len(noised), device=noised.device)
        return self.recall(noised, t, condition, path, rows, Recall(name=""))

    def recall(
        self, noised: Latents, t: Tensor, condition: Condition, path: NoisePath, rows: Rows, kept: Recall
    ) -> Latents:
        """The same with what these rows of the trajectory have kept of each network."""
        index = torch.bucketize(t.contiguous(), torch.tensor(self.bounds, dtype=t.dtype, device=t.device), right=True)
        said = torch.zeros_like(noised)
        for number, expert in enumerate(self.networks):
            its = (index == number).nonzero().squeeze(-1)
            if len(its):
                own = (noised[its], t[its], condition.rows(its), path, rows[its], kept.part(str(number)))
                said = said.index_copy(0, its, expert.recall(*own).to(said.dtype))
        return said

    def to(self, device: torch.device | str) -> "ScheduledExpert":
        """Move the networks to a device, in place."""
        for expert in self.networks:
            expert.to(device)
        return self

    def save(self, folder: Path) -> None:
        """Write every network, and `schedule.json` beside them."""
        folder.mkdir(parents=True, exist_ok=True)
        for number, expert in enumerate(self.networks):
            expert.save(folder / str(number))
        course = {} if self.course is None else {"course": self.course.described()}
        write_json(folder / SCHEDULE, {"bounds": list(self.bounds)} | course)

    @classmethod
    def load(cls, folder: Path) -> "ScheduledExpert":
        """Read what `save` wrote; raises an `ArtifactError` if a file is missing or broken."""
        found = read_json(folder / SCHEDULE)
        try:
            bounds = tuple(float(bound) for bound in found["bounds"])
            networks = [Expert.load(folder / str(number)) for number in range(len(bounds) + 1)]
            course = Course.parsed(found["course"]) if "course" in found else None
            return cls(networks=networks, bounds=bounds, course=course)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptArtifact(f"{folder / SCHEDULE} is no schedule: {error}; make the ensemble again") from error


def is_scheduled(folder: Path) -> bool:
    """Whether an expert's folder holds several networks."""
    return (folder / SCHEDULE).is_file()
