"""The router: the posterior p(k | noised, t, condition) from a network, the prior p(k | condition) from counts."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ddm_core.artifacts import CorruptArtifact, read_json, write_json
from experts.condition import Condition
from experts.diffusion.noise_schedule import NOISE_SCHEDULES, NoiseSchedule
from experts.networks.model_io import load_model, save_model
from router.calibration.temperature import Temperatures, apply_temperature, unit_temperatures
from router.calibration.time_bins import BINS
from router.models.registry import ROUTERS

Latents = Float[Tensor, "batch *latent"]
Times = Float[Tensor, " batch"]
Logits = Float[Tensor, "batch expert"]

SETTINGS = "router.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """Which expert a noised sample speaks to, before any selection."""

    model: nn.Module
    """(noised, t, class index) -> logits; one of `router/models/registry.py`."""
    noise_schedule: NoiseSchedule
    """The noise path it was trained on, which is the ensemble's."""
    prior_counts: Float[Tensor, "condition expert"]
    """Training samples of every class in every cluster; the last row counts all samples."""
    temperatures: Temperatures = field(default_factory=unit_temperatures)
    """What the network's logits are divided by, over t."""

    @property
    def num_experts(self) -> int:
        """K, missing experts included."""
        return self.prior_counts.shape[1]

    @property
    def num_classes(self) -> int:
        """Classes of the condition; 0 without labels."""
        return self.prior_counts.shape[0] - 1

    def logits(self, noised: Latents, t: Times, condition: Condition) -> Logits:
        """log p(k | noised, t, condition) up to a constant a row; a null condition gives p(k | noised, t)."""
        return apply_temperature(self.uncalibrated_logits(noised, t, condition), self.temperatures, t, condition)

    def uncalibrated_logits(self, noised: Latents, t: Times, condition: Condition) -> Logits:
        """What the network says."""
        logits: Logits = self.model(noised, t, condition.embedding_index(self.num_classes))
        return logits

    def prior_logits(self, condition: Condition, present: Bool[Tensor, " expert"] | None = None) -> Logits:
        """log p(k | condition) among the `present` experts, up to a constant a row; -inf where no sample is.

        A class that no present expert has seen gets the prior of all samples.
        """
        counts = self.prior_counts.to(condition.class_id.device)
        if present is not None:
            counts = counts * present.to(counts.device)
        rows = counts[condition.embedding_index(self.num_classes)]
        return torch.where(rows.sum(-1, keepdim=True) > 0, rows, counts[-1]).log()

    def to(self, device: torch.device | str) -> "Router":
        """Move the network to a device, in place."""
        self.model.to(device)
        return self

    def save(self, folder: Path) -> None:
        """Write the network as diffusers does, and `router.json`."""
        kind = next(name for name, network in ROUTERS.items() if isinstance(self.model, network))
        save_model(self.model, folder)
        settings = {
            "kind": kind,
            "noise_schedule": self.noise_schedule.name,
            "prior_counts": self.prior_counts.tolist(),
            "temperatures": self.temperatures.tolist(),
        }
        write_json(folder / SETTINGS, settings)

    @classmethod
    def load(cls, folder: Path) -> "Router":
        """Read what `save` wrote; raises an `ArtifactError` if a file is missing, broken or of another version."""
        found = read_json(folder / SETTINGS)
        try:
            network, path = ROUTERS[found["kind"]], NOISE_SCHEDULES[found["noise_schedule"]]
            counts = torch.tensor(found["prior_counts"], dtype=torch.float64)
            if counts.ndim != 2:
                raise ValueError(f"prior_counts of shape {tuple(counts.shape)}")
            temperatures = torch.tensor(found["temperatures"], dtype=torch.float64)
            if temperatures.shape != (2, BINS) or not (temperatures > 0).all() or not temperatures.isfinite().all():
                raise ValueError(f"temperatures {found['temperatures']}")
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptArtifact(f"{folder / SETTINGS} was written by another version: {error}") from error
        model = load_model((network,), folder)
        return cls(model=model, noise_schedule=path, prior_counts=counts, temperatures=temperatures)


def count_priors(
    cluster_id: Tensor, class_id: Tensor, num_experts: int, num_classes: int
) -> Float[Tensor, "condition expert"]:
    """How many samples of every class are in every cluster; the last row counts all samples, also unlabelled ones."""
    counts = torch.zeros(num_classes + 1, num_experts, dtype=torch.float64)
    is_labelled = class_id >= 0
    ones = torch.ones(len(cluster_id), dtype=torch.float64)
    counts.index_put_((class_id[is_labelled], cluster_id[is_labelled]), ones[is_labelled], accumulate=True)
    counts[-1] = torch.bincount(cluster_id, minlength=num_experts).double()
    return counts
