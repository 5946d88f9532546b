"""The router: the posterior p(k | noised, t, condition) from a network, and the prior p(k | condition)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ddm_core.artifacts import CorruptArtifact, read_json, write_json
from experts.conditions.condition import Condition
from experts.conditions.null_text import get_null_text, load_null_text, set_null_text
from experts.diffusion.noise_schedule import NOISE_SCHEDULES, NoiseSchedule
from experts.expert_model import ExpertModel
from experts.networks.model_io import load_model, move_model, save_model
from router.calibration.temperature import Temperatures, apply_temperature, unit_temperatures
from router.calibration.text_prior import TextPrior
from router.calibration.time_bins import BINS
from router.models.density import DensityRouter
from router.models.registry import IMPORTED_ROUTERS, READS_TEXT, ROUTERS, call_router

Latents = Float[Tensor, "batch *latent"]
Times = Float[Tensor, " batch"]
Logits = Float[Tensor, "batch expert"]

SETTINGS, TEXT_PRIOR = "router.json", "text_prior.safetensors"
NETWORKS = {str(name): network for name, network in ROUTERS.items()} | IMPORTED_ROUTERS


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """Logits and prior over the experts for a noised sample, before any selection."""

    model: nn.Module
    """(noised, t, class index, pooled text) -> logits; one of `router/models/registry.py`."""
    noise_schedule: NoiseSchedule
    """Noise schedule of its training, which is that of the ensemble."""
    prior_counts: Float[Tensor, "condition expert"]
    """Number of training samples of every class in every cluster; the last row counts all samples."""
    temperatures: Temperatures = field(default_factory=unit_temperatures)
    """Divisors of the network's logits, as a function of t."""
    text_prior: TextPrior | None = None
    """p(k | text) for rows with a text; None for data without text."""
    experts: Mapping[int, ExpertModel] | None = None
    """Those whose losses the kind `density` reads; an `Ensemble` passes its own. None gives the prior."""

    @property
    def num_experts(self) -> int:
        """Return K, missing experts included."""
        return self.prior_counts.shape[1]

    @property
    def num_classes(self) -> int:
        """Return the number of classes of the condition; 0 without labels."""
        return self.prior_counts.shape[0] - 1

    @property
    def reads_experts(self) -> bool:
        """Return whether its logits need the experts."""
        return isinstance(self.model, DensityRouter)

    def logits(self, noised: Latents, t: Times, condition: Condition) -> Logits:
        """Return log p(k | noised, t, condition) up to a constant per row; a null condition gives p(k | noised, t)."""
        return apply_temperature(self.uncalibrated_logits(noised, t, condition), self.temperatures, t, condition)

    def uncalibrated_logits(self, noised: Latents, t: Times, condition: Condition) -> Logits:
        """Return the logits of the network, without temperatures."""
        logits = call_router(self.model, noised, t, condition, self.num_classes)
        if isinstance(self.model, DensityRouter) and self.experts:
            logits = logits + self.model.log_densities(self.experts, noised, t, condition, self.noise_schedule)
        if self.text_prior is None or condition.text is None or isinstance(self.model, READS_TEXT):
            return logits
        table = self.model.get_buffer("log_prior")[condition.embedding_index(self.num_classes)]
        log_prior = self.text_prior.logits(condition).log_softmax(-1).to(logits)
        return torch.where(condition.has_null_text[:, None], logits, logits - table + log_prior)

    def prior_logits(self, condition: Condition, present: Bool[Tensor, " expert"] | None = None) -> Logits:
        """Return log p(k | condition) among the `present` experts, up to a constant per row; -inf without samples.

        A class that no present expert was trained on gets the prior of all samples. Raises `ValueError` for a text
        that the router was not trained on.
        """
        condition = condition.filled(get_null_text(self.model))
        counts = self.prior_counts.to(condition.class_id.device)
        if present is not None:
            counts = counts * present.to(counts.device)
        rows = counts[condition.embedding_index(self.num_classes)]
        by_class = torch.where(rows.sum(-1, keepdim=True) > 0, rows, counts[-1]).log()
        if self.text_prior is None or condition.text is None:
            return by_class
        by_text = self.text_prior.logits(condition).masked_fill(counts[-1] == 0, -torch.inf)
        return torch.where(condition.has_null_text[:, None], by_class, by_text)

    def to(self, device: torch.device | str) -> "Router":
        """Move the network to a device, in place."""
        move_model(self.model, device)
        return self

    def save(self, folder: Path) -> None:
        """Write the network in diffusers' format, and `router.json`."""
        kind = next(name for name, network in NETWORKS.items() if isinstance(self.model, network))
        save_model(self.model, folder)
        if self.text_prior is not None:
            self.text_prior.save(folder / TEXT_PRIOR)
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
        settings = read_json(folder / SETTINGS)
        try:
            network, noise_schedule = NETWORKS[settings["kind"]], NOISE_SCHEDULES[settings["noise_schedule"]]
            counts = torch.tensor(settings["prior_counts"], dtype=torch.float64)
            if counts.ndim != 2:
                raise ValueError(f"prior_counts of shape {tuple(counts.shape)}")
            temperatures = torch.tensor(settings["temperatures"], dtype=torch.float64)
            if temperatures.shape != (2, BINS) or not (temperatures > 0).all() or not temperatures.isfinite().all():
                raise ValueError(f"temperatures {settings['temperatures']}")
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptArtifact(f"{folder / SETTINGS} was written by another version: {error}") from error
        return cls(
            model=set_null_text(load_model((network,), folder), load_null_text(folder)),
            noise_schedule=noise_schedule,
            prior_counts=counts,
            temperatures=temperatures,
            text_prior=TextPrior.load(folder / TEXT_PRIOR) if (folder / TEXT_PRIOR).is_file() else None,
        )


def count_priors(
    cluster_id: Tensor, class_id: Tensor, num_experts: int, num_classes: int
) -> Float[Tensor, "condition expert"]:
    """Count the samples of every class in every cluster; the last row counts all samples, also unlabeled ones."""
    counts = torch.zeros(num_classes + 1, num_experts, dtype=torch.float64)
    is_labeled = class_id >= 0
    ones = torch.ones(len(cluster_id), dtype=torch.float64)
    counts.index_put_((class_id[is_labeled], cluster_id[is_labeled]), ones[is_labeled], accumulate=True)
    counts[-1] = torch.bincount(cluster_id, minlength=num_experts).double()
    return counts
