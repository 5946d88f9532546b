"""Distance to the clusters' centroids after denoising: a router in closed form, but for one scale per bin of t.

The denoiser is the best linear one (Wiener's filter), x0(x, t) = m + alpha C (alpha^2 C + sigma^2)^-1 (x - alpha m),
with the data's mean m and covariance C. Logits are - |x0(x, t) - x0(alpha mu_k, t)|^2 / (2 s(t)^2) + log p(k | c): the
centroid mu_k is looked at through the same denoiser, which leaves it where it is at t = 0. At t = 1 both are m, so that
nothing but the prior is left; the distance to mu_k itself would go on favouring clusters near the mean.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ddm_core.artifacts import Workspace
from experts.condition import Condition
from experts.config import NoiseScheduleName
from experts.diffusion.noise_schedule import NOISE_SCHEDULES
from experts.training.latent_dataset import LatentDataset
from experts.training.trainer import TrainingResult
from router.calibration.temperature import collect_logits
from router.calibration.time_bins import BINS, at_t, fit_logarithms
from router.config import RouterConfig
from router.models.mlp import ClassIndex, Latents, Logits, Times
from router.models.prior_table import Counts, log_prior

MOMENT_ROWS: Final = 16_384
"""Samples that mean and covariance are taken from, spread over all clusters."""
LARGEST_LATENT: Final = 8192
LEAST_VARIANCE: Final = 1e-6
"""Of a direction, as a share of the largest: no direction is trusted without end."""


class NearestCentroidRouter(ModelMixin, ConfigMixin):
    """Everything is kept in the basis of the covariance's eigenvectors, about the mean."""

    mean: Tensor
    basis: Tensor
    variances: Tensor
    centroids: Tensor
    log_scale: Tensor
    """log of s(t) over the root mean variance of what the denoiser puts out, one per bin of t."""
    log_prior: Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, latent_shape: Sequence[int], num_experts: int, num_classes: int, path: NoiseScheduleName
    ) -> None:
        super().__init__()
        size = math.prod(latent_shape)
        if size > LARGEST_LATENT:
            raise ValueError(
                f"router.kind=centroids needs the covariance of latents of at most {LARGEST_LATENT} numbers; these "
                f"have {size}: choose a codec of smaller latents (codec=pca), or another router"
            )
        self.path = NOISE_SCHEDULES[path]
        shapes = {
            "mean": (size,),
            "basis": (size, size),
            "variances": (size,),
            "centroids": (num_experts, size),
            "log_scale": (BINS,),
            "log_prior": (num_classes + 1, num_experts),
        }
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))

    def forward(self, noised: Latents, t: Times, class_index: ClassIndex) -> Logits:
        """Minus half the squared distance in units of s(t)^2, up to a constant a row, and the prior."""
        closeness = self.closeness(noised, t) * (-2 * at_t(self.log_scale, t)).exp().unsqueeze(-1).to(noised)
        return closeness + self.log_prior[class_index]

    def closeness(self, noised: Latents, t: Times) -> Logits:
        """Minus half the squared distance in units of the denoised data's mean variance, up to a constant a row."""
        alpha, sigma = (of_t(t).unsqueeze(-1).to(noised) for of_t in (self.path.alpha, self.path.sigma))
        spread = alpha**2 * self.variances + sigma**2
        gain = self.variances / spread
        weight = gain**2 / (gain**2 * spread).mean(-1, keepdim=True)
        turned = (noised.flatten(1) - alpha * self.mean) @ self.basis
        across = (weight * turned) @ self.centroids.T
        return alpha * across - alpha**2 / 2 * (weight @ self.centroids.square().T)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Mean and covariance of latents, the latter as eigenvectors (columns) and eigenvalues."""

    mean: Float[Tensor, " size"]
    basis: Float[Tensor, "size size"]
    variances: Float[Tensor, " size"]


def moments_of(dataset: LatentDataset) -> Moments:
    """From at most `MOMENT_ROWS` samples."""
    clean = dataset.clean[:: -(-len(dataset) // MOMENT_ROWS)].flatten(1).double()
    mean = clean.mean(0)
    centred = clean - mean
    variances, basis = torch.linalg.eigh(centred.T @ centred / len(clean))
    least = LEAST_VARIANCE * variances.amax().clamp(min=torch.finfo(torch.float32).tiny)
    return Moments(mean=mean, basis=basis, variances=variances.clamp(min=least))


def fit_centroids(
    config: RouterConfig, dataset: LatentDataset, counts: Counts, _workspace: Workspace
) -> TrainingResult:
    """Moments and centroids in closed form; then the scales, by cross-entropy on training samples."""
    model = NearestCentroidRouter(list(dataset.latent_shape), counts.shape[1], len(counts) - 1, config.noise_schedule)
    moments = moments_of(dataset)
    sums = torch.zeros(counts.shape[1], len(moments.mean), dtype=torch.float64)
    sums.index_add_(0, dataset.cluster_id, dataset.clean.flatten(1).double())
    sizes = dataset.cluster_id.bincount(minlength=len(sums)).clamp(min=1).unsqueeze(1)
    found = {
        "mean": moments.mean,
        "basis": moments.basis,
        "variances": moments.variances,
        "centroids": (sums / sizes - moments.mean) @ moments.basis,
        "log_scale": torch.zeros(BINS),
        "log_prior": log_prior(counts),
    }
    model.load_state_dict({name: value.float() for name, value in found.items()})
    model.log_scale = _fit_scales(model, dataset).float()
    return TrainingResult(model=model.eval(), rows=[])


def _fit_scales(model: NearestCentroidRouter, dataset: LatentDataset) -> Float[Tensor, " bin"]:
    def speak(noised: Latents, t: Times, _condition: Condition) -> Logits:
        return model.closeness(noised, t)

    answers = collect_logits(speak, dataset, model.path, conditional=False)
    prior = model.log_prior[-1].double()

    def loss(logarithms: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
        logits = answers.logits * (-2 * logarithms).exp().unsqueeze(-1) + prior
        return functional.cross_entropy(logits, answers.cluster_id)

    return fit_logarithms(loss, answers.t)
