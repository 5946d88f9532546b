"""Experts of several networks that divide [0, 1] by t, and their training: each network on its own interval of t.

expert_k/time_split.json   the t at which each network hands over to the next
expert_k/0 ...             the networks, from t = 0 to t = 1

Isolated experts of noise levels, as in eDiff-I (Balaji et al. 2022, arXiv:2211.01324) and Terrain Diffusion Network (Hu
et al. 2023, arXiv:2308.16725). The t of a sample is known, so that no router chooses among them.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ddm_core.artifacts import CorruptArtifact, Workspace, read_json, write_json
from ddm_core.json_values import from_json
from experts.compressed.caching.feature_cache import ExpertCache
from experts.conditions.condition import Condition
from experts.config import ExpertConfig
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.intervals import share_of
from experts.diffusion.noise_schedule import NoiseSchedule
from experts.expert import Expert, ExpertSummary
from experts.expert_model import CallFlops, ExpertModel
from experts.training.checkpoint import MetricsRow
from experts.training.held_out import HELD_OUT
from experts.training.trainer import write_rows
from experts.types import Latents

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
    def noise_schedule(self) -> NoiseSchedule:
        """Return the noise schedule of the first network."""
        return self.experts[0].noise_schedule

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


def train_intervals(
    config: ExpertConfig, out: Path, workspace: Workspace, train: Callable[..., ExpertSummary]
) -> ExpertSummary:
    """Train one network, or with `time_bounds` one for each interval of t, one after the other; write them to `out`.

    `train` is `train_expert` with its data. Each network gets an equal part of the batch, so that all together
    cost what one would. Rows of metrics are those of all networks together: losses by the share of t that each trains
    on, and held-out losses by the t at which they are measured.
    """
    if not config.time_bounds:
        return train(config=config, out=out, workspace=workspace)
    intervals = list(pairwise((0.0, *config.time_bounds, 1.0)))
    rows, parts = config.training.batch_size // len(intervals), []
    part_config = replace(config, time_bounds=(), training=replace(config.training, batch_size=rows))
    for number, interval in enumerate(intervals):
        part = {"out": out / str(number), "workspace": workspace.part(str(number))}
        parts.append(train(config=part_config, interval=interval, **part))
    write_json(out / TIME_SPLIT, {"bounds": list(config.time_bounds)})
    shares = [share_of(interval, config.training) for interval in intervals]
    files = [out / str(number) / "metrics.jsonl" for number in range(len(parts))]
    rows_of_parts = [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]
    write_rows(out / "metrics.jsonl", join_rows(rows_of_parts, shares))
    summary = ExpertSummary(
        flops=sum(part.flops for part in parts),
        steps=max(part.steps for part in parts),
        epochs=sum(part.epochs for part in parts),
        images=parts[0].images,
        parameters=sum(part.parameters for part in parts),
        final_loss=sum(share * part.final_loss for share, part in zip(shares, parts, strict=True)),
    )
    write_json(out / "training.json", summary)
    return summary


def join_rows(parts: Sequence[Sequence[MetricsRow]], shares: Sequence[float]) -> list[MetricsRow]:
    """Return one row for every step at which a network has one; a network that has ended counts by its last."""
    joined = []
    for step in sorted({int(row["step"]) for rows in parts for row in rows}):
        latest = [rows[bisect_right(rows, step, key=itemgetter("step")) - 1] for rows in parts]
        names = set.intersection(*map(set, latest)) - {"step", "lr"}
        row: MetricsRow = {"step": step, "lr": latest[0]["lr"]}
        row |= {
            name: sum(share * row[name] for share, row in zip(shares, latest, strict=True)) for name in sorted(names)
        }
        if HELD_OUT in names:
            measured = {key: value for part in latest for key, value in part.items() if key.startswith(f"{HELD_OUT}_")}
            row |= measured | {HELD_OUT: sum(measured.values()) / len(measured)}
        joined.append(row)
    return joined
