"""Router kind `density`: the experts' own losses are the router, and nothing is trained.

The forward process goes on from a noised sample x at t to x_s at s > t, so the loss of predicting x from x_s bounds
the expert's density of x as the loss of a diffusion model does that of clean data (Kingma et al. 2021,
arXiv:2107.00630, equation (17); with the best denoiser the bound is exact):

    - log p_k(x, t | c) = int_t^1 w(s) E |x0* - x0_k(x_s, s | c)|^2 ds + const
    w = alpha (alpha sigma' - alpha' sigma) / sigma^3
    x_s = r x + tau e      r = alpha_s / alpha_t      tau^2 = sigma_s^2 - r^2 sigma_t^2
    x0* = x / alpha_t - r sigma_t^2 / (alpha_t tau) e

x0* is the clean sample for which E[x | x_s, x0*] is x; at t = 0 it is x. All experts and rows share the same few s and
noises e, each with its negative, so that most of the variance cancels between experts (as between the classes of Li et
al. 2023, arXiv:2303.16203). At t = 1 nothing is left to predict, and only the prior remains.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor

from ddm_core.artifacts import Workspace
from ddm_core.errors import DDMError
from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import NoiseSchedule, expand
from experts.diffusion.predictions import to_clean_and_noise
from experts.expert_model import ExpertModel
from experts.training.latent_dataset import LatentDataset
from experts.training.trainer import TrainingResult
from router.config import RouterConfig
from router.models.mlp import ClassIndex, Latents, Logits, Times
from router.models.prior_table import Counts, compute_log_prior

SEED = 21_070_063
MAX_T = 0.999
"""Above it, where x says nearly nothing of the clean sample, x is read as if it were at this t."""


class DensityError(DDMError, ValueError):
    """The experts have no density that a loss could measure."""


class DensityRouter(ModelMixin, ConfigMixin):
    """Table of the prior, and the number of draws of each expert's loss."""

    log_prior: Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, num_experts: int, num_classes: int, draws: int) -> None:
        super().__init__()
        self.draws = draws
        self.register_buffer("log_prior", compute_log_prior(torch.ones(num_classes + 1, num_experts)))

    def forward(self, noised: Latents, t: Times, class_index: ClassIndex) -> Logits:  # noqa: ARG002 - the call of routers
        """Return log p(k | class), to which `log_densities` is added."""
        return self.log_prior[class_index]

    def log_densities(
        self,
        experts: Mapping[int, ExpertModel],
        noised: Latents,
        t: Times,
        condition: Condition,
        noise_schedule: NoiseSchedule,
    ) -> Logits:
        """Return log p_k(noised, t | condition) up to a constant per row; a missing expert gets the others' mean.

        Raises `DensityError` for students of few steps, whose outputs are no velocities at any t.
        """
        if students := sorted(k for k, expert in experts.items() if expert.few_step is not None):
            raise DensityError(
                f"router=density reads the losses of experts at any t, and experts {students} take few; "
                "use ensemble.selection.name=sticky, which needs no router, or another router"
            )
        losses = noised.new_zeros(len(noised), self.log_prior.shape[1], dtype=torch.float64)
        columns = sorted(experts)
        for draw in _make_draws(noised, t, noise_schedule, self.draws):
            for k in columns:
                velocity = experts[k].velocity(draw.noised, draw.s, condition, noise_schedule)
                clean = to_clean_and_noise("velocity", velocity, draw.noised, draw.s, noise_schedule).clean
                losses[:, k] += draw.weight * (draw.target - clean).double().square().flatten(1).sum(1)
        missing = [k for k in range(losses.shape[1]) if k not in experts]
        losses[:, missing] = losses[:, columns].mean(1, keepdim=True)
        return -losses.to(noised.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draw:
    """One evaluation of every expert: later noised samples, and what their clean estimates are compared with."""

    s: Times
    noised: Latents
    target: Latents
    weight: Float[Tensor, " batch"]
    """Of the squared difference, per unit of probability of the draw."""


def _make_draws(noised: Latents, t: Times, schedule: NoiseSchedule, draws: int) -> Iterator[_Draw]:
    """Yield the draws: s from t to 1, denser near t, and equal noises for all rows, each with its negative."""
    generator = torch.Generator().manual_seed(SEED)
    length, t = 1 - t, t.clamp(max=MAX_T)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    count = -(-draws // 2)
    for index in range(count):
        fraction = (index + 0.5) / count
        s, step = t + (1 - t) * fraction**2, length * 2 * fraction / count
        noise = torch.randn(noised.shape[1:], generator=generator).to(noised)
        ratio = schedule.alpha(s) / alpha
        tau = (schedule.sigma(s) ** 2 - (ratio * sigma) ** 2).sqrt()
        wronskian = schedule.alpha(s) * schedule.sigma_dot(s) - schedule.alpha_dot(s) * schedule.sigma(s)
        weight = schedule.alpha(s) * wronskian / schedule.sigma(s) ** 3 * step
        for sign in (1, -1):
            yield _Draw(
                s=s,
                noised=expand(ratio, noised) * noised + expand(sign * tau, noised) * noise,
                target=noised / expand(alpha, noised) - expand(sign * ratio * sigma**2 / (alpha * tau), noised) * noise,
                weight=weight.double() / 2,
            )


def fit_density(config: RouterConfig, _dataset: LatentDataset, counts: Counts, _workspace: Workspace) -> TrainingResult:
    """Create the table; there is no training."""
    model: DensityRouter = DensityRouter(counts.shape[1], counts.shape[0] - 1, config.draws)
    model.log_prior = compute_log_prior(counts).float()
    model.eval()
    return TrainingResult(model=model, rows=[])
