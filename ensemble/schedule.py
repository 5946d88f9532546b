"""An expert that is several networks, each for its own interval of t: a small one here, a full one there.

expert_k/schedule.json    where the intervals meet
expert_k/0 …              the networks, that of the smallest t first
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from artifacts import CorruptArtifact, read_json, write_json
from experts.condition import Condition
from experts.course import Course
from experts.expert import Expert
from experts.noise_path import Latents, NoisePath
from experts.reuse import Recall, Rows

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
