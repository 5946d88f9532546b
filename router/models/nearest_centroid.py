"""Router kind `nearest_centroid`: distance to the centroids after denoising, in closed form except one scale per bin.

The denoiser is the best linear one (Wiener filter), x0(x, t) = m + alpha C (alpha^2 C + sigma^2)^-1 (x - alpha m);
m and C are mean and covariance of the data. Logits are - |x0(x, t) - x0(alpha mu_k, t)|^2 / (2 s(t)^2) + log p(k | c).
The centroid mu_k passes through the same denoiser, which is the identity at t = 0. At t = 1 both points are m, so only
the prior remains. The distance to mu_k itself would still favor clusters near the mean.
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
from experts.conditions.condition import Condition
from experts.config import NoiseScheduleName
from experts.diffusion.noise_schedule import NOISE_SCHEDULES
from experts.training.latent_dataset import LatentDataset
from experts.training.trainer import TrainingResult
from router.calibration.temperature import collect_logits
from router.calibration.time_bins import BINS, fit_logarithms, interpolate
from router.config import RouterConfig
from router.models.mlp import ClassIndex, Latents, Logits, Times
from router.models.prior_table import Counts, compute_log_prior

MOMENT_ROWS: Final = 16_384
"""Maximum number of samples for mean and covariance, spread over all clusters."""
MAX_LATENT_SIZE: Final = 8192
MIN_RELATIVE_VARIANCE: Final = 1e-6
"""Minimum variance of a direction, relative to the largest: it bounds the weight of any direction."""


class NearestCentroidRouter(ModelMixin, ConfigMixin):
    """Moments and centroids in the basis of the covariance's eigenvectors, relative to the mean."""

    mean: Tensor
    basis: Tensor
    variances: Tensor
    centroids: Tensor
    log_scale: Tensor
    """log of s(t) over the root mean variance of the denoiser's output, one per bin of t."""
    log_prior: Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, latent_shape: Sequence[int], num_experts: int, num_classes: int, path: NoiseScheduleName
    ) -> None:
        super().__init__()
        size = math.prod(latent_shape)
        if size > MAX_LATENT_SIZE:
            raise ValueError(
                f"router.kind=nearest_centroid needs the covariance of latents of at most {MAX_LATENT_SIZE} numbers; "
                f"these have {size}: choose a codec of smaller latents (codec=pca), or another router"
            )
        self.noise_schedule = NOISE_SCHEDULES[path]
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
        """Return minus half the squared distance in units of s(t)^2, up to a constant per row, plus the log prior."""
        closeness = self.closeness(noised, t) * (-2 * interpolate(self.log_scale, t)).exp().unsqueeze(-1).to(noised)
        return closeness + self.log_prior[class_index]

    def closeness(self, noised: Latents, t: Times) -> Logits:
        """Return minus half the squared distance in units of the denoised mean variance, up to a constant per row."""
        alpha, sigma = (
            of_t(t).unsqueeze(-1).to(noised) for of_t in (self.noise_schedule.alpha, self.noise_schedule.sigma)
        )
        noised_variances = alpha**2 * self.variances + sigma**2
        gain = self.variances / noised_variances
        weight = gain**2 / (gain**2 * noised_variances).mean(-1, keepdim=True)
        coordinates = (noised.flatten(1) - alpha * self.mean) @ self.basis
        projection = (weight * coordinates) @ self.centroids.T
        return alpha * projection - alpha**2 / 2 * (weight @ self.centroids.square().T)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Mean and covariance of latents, the latter as eigenvectors (columns) and eigenvalues."""

    mean: Float[Tensor, " size"]
    basis: Float[Tensor, "size size"]
    variances: Float[Tensor, " size"]


def compute_moments(dataset: LatentDataset) -> Moments:
    """Compute mean and covariance of at most `MOMENT_ROWS` samples."""
    clean = dataset.clean_rows(torch.arange(0, len(dataset), -(-len(dataset) // MOMENT_ROWS))).flatten(1).double()
    mean = clean.mean(0)
    centered = clean - mean
    variances, basis = torch.linalg.eigh(centered.T @ centered / len(clean))
    min_variance = MIN_RELATIVE_VARIANCE * variances.amax().clamp(min=torch.finfo(torch.float32).tiny)
    return Moments(mean=mean, basis=basis, variances=variances.clamp(min=min_variance))


def fit_nearest_centroid(
    config: RouterConfig, dataset: LatentDataset, counts: Counts, _workspace: Workspace
) -> TrainingResult:
    """Compute moments and centroids in closed form; then fit the scales by cross-entropy on training samples."""
    model = NearestCentroidRouter(list(dataset.latent_shape), counts.shape[1], len(counts) - 1, config.noise_schedule)
    moments = compute_moments(dataset)
    sums = torch.zeros(counts.shape[1], len(moments.mean), dtype=torch.float64)
    sums.index_add_(0, dataset.cluster_id, dataset.clean_rows(torch.arange(len(dataset))).flatten(1).double())
    sizes = dataset.cluster_id.bincount(minlength=len(sums)).clamp(min=1).unsqueeze(1)
    buffers = {
        "mean": moments.mean,
        "basis": moments.basis,
        "variances": moments.variances,
        "centroids": (sums / sizes - moments.mean) @ moments.basis,
        "log_scale": torch.zeros(BINS),
        "log_prior": compute_log_prior(counts),
    }
    model.load_state_dict({name: value.float() for name, value in buffers.items()})
    model.log_scale = _fit_scales(model, dataset).float()
    return TrainingResult(model=model.eval(), rows=[])


def _fit_scales(model: NearestCentroidRouter, dataset: LatentDataset) -> Float[Tensor, " bin"]:
    def unscaled_logits(noised: Latents, t: Times, _condition: Condition) -> Logits:
        return model.closeness(noised, t)

    labeled = collect_logits(unscaled_logits, dataset, model.noise_schedule, conditional=False)
    prior = model.log_prior[-1].double()

    def loss(logarithms: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
        logits = labeled.logits * (-2 * logarithms).exp().unsqueeze(-1) + prior
        return functional.cross_entropy(logits, labeled.cluster_id)

    return fit_logarithms(loss, labeled.t)
