"""A few trajectories as previews and gates: what an image looks like on its way, and which expert draws it when."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from ddm_core.artifacts import save_arrays
from ensemble.config import TRAJECTORIES, SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.pipeline import EnsemblePipeline
from ensemble.routing import RoutingState
from ensemble.sampling.images import to_bytes
from ensemble.sampling.prompts import Prompts
from ensemble.sampling.sample import guidance_scale_of
from experts.conditions.condition import Condition
from experts.diffusion.predictions import to_clean
from router.config import SelectionConfig

MAX_TIMES, MAX_FRAMES, MAX_SIDE = 32, 9, 96
"""Kept t of a trajectory, those of them with a preview, and the larger side of a preview in pixels."""

Latents = Float[Tensor, "batch *latent"]
Times = Float[Tensor, " batch"]
Gates = Float[Tensor, " expert"]


@dataclass(frozen=True, kw_only=True)
class RecordingEnsemble(Ensemble):
    """An ensemble that keeps the clean prediction and the gates of every evaluation, by seed and t."""

    guidance_scale: float
    steps: dict[int, dict[float, tuple[Float[Tensor, "*latent"], Gates, Gates]]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    """Clean prediction, gates of the selection, and p(k | noised, t, condition); of equal t the last evaluation."""

    def velocity(self, noised: Latents, t: Times, condition: Condition, routing: RoutingState) -> Latents:
        """Return the marginal velocity, and keep what it says of the branch with the condition."""
        velocity, count = super().velocity(noised, t, condition, routing), len(noised) // routing.branches
        noised, t, seeds = noised[:count], t[:count], routing.seeds[:count]
        guided = velocity[-count:] + self.guidance_scale * (velocity[:count] - velocity[-count:])
        clean = to_clean("velocity", guided, noised, t, self.noise_schedule).cpu()
        condition = condition.rows(slice(0, count))
        full = self.init_routing(seeds, condition, SelectionConfig(name="full"))
        posterior = self.gates(noised, t, condition, full).float().cpu()
        for row, seed in enumerate(seeds):
            self.steps[seed][float(t[row])] = clean[row], routing.gates[row].float().cpu(), posterior[row]
        return velocity


def write_trajectories(
    folder: Path, seeds: Sequence[int], prompts: Prompts | None, sampling: SamplingConfig, out: Path
) -> None:
    """Sample the seeds from a pipeline's folder and write `TRAJECTORIES` into `out`, at most 0.3 MB for each seed.

    `times` has the kept t, `gates` those of the selection and `posterior` those of the router, (seed, time, expert);
    `frames` has the previews of the times numbered in `shown`, and at last the image, (seed, frame, height, width,
    channel).
    """
    pipeline = EnsemblePipeline.from_pretrained(folder)
    prompts = prompts and prompts.for_classes(pipeline.num_classes)
    parts = {part.name: getattr(pipeline.ensemble, part.name) for part in fields(Ensemble)}
    recorder = RecordingEnsemble(**parts, guidance_scale=guidance_scale_of(pipeline.ensemble, sampling))
    images = replace(pipeline, ensemble=recorder)(seeds, sampling, prompts).images
    every = sorted(recorder.steps[seeds[0]], reverse=True)
    times = [every[place] for place in _spread(len(every), MAX_TIMES)]
    shown = _spread(len(times), MAX_FRAMES)
    rows = [[recorder.steps[seed][t] for t in times] for seed in seeds]
    frames = []
    for row, image in zip(rows, images, strict=True):
        clean = torch.stack([row[place][0] for place in shown]).to(sampling.device)
        with torch.inference_mode():
            decoded = pipeline.codec.decode(clean).float().cpu()
        frames.append(to_bytes(_shrink(torch.cat([decoded, image[None]]))))
    arrays: dict[str, np.ndarray] = {
        "seeds": np.array(seeds, np.int64),
        "times": np.array(times, np.float32),
        "shown": np.array(shown, np.int64),
        "gates": torch.stack([torch.stack([gates for _, gates, _ in row]) for row in rows]).numpy(),
        "posterior": torch.stack([torch.stack([posterior for *_, posterior in row]) for row in rows]).numpy(),
        "frames": np.stack(frames),
    }
    save_arrays(out / TRAJECTORIES, arrays)


def _spread(count: int, most: int) -> list[int]:
    """Return up to `most` of `count` places, evenly spread, the first and the last among them."""
    return [int(place) for place in np.linspace(0, count - 1, min(count, most)).round()]


def _shrink(images: Float[Tensor, "frame height width channel"]) -> Float[Tensor, "frame height width channel"]:
    scale = MAX_SIDE / max(images.shape[1:3])
    if scale >= 1:
        return images
    size = [max(1, round(side * scale)) for side in images.shape[1:3]]
    return interpolate(images.movedim(3, 1), size, mode="area").movedim(1, 3)
