import pytest
import torch

from ddm_core.artifacts import Workspace
from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import COSINE, NOISE_SCHEDULES, RECTIFIED_FLOW
from experts.training.latent_dataset import LatentDataset
from router.config import RouterConfig
from router.models.nearest_centroid import NearestCentroidRouter, fit_nearest_centroid
from router.router import Router
from tests.oracles import MixtureOfGaussians

SHARES = (0.5, 0.3, 0.2)


def make_dataset(mixture: MixtureOfGaussians, count: int = 3000) -> LatentDataset:
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor(mixture.shares)
    cluster_id = torch.multinomial(shares, count, replacement=True, generator=generator)
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    clean = mixture.means[cluster_id] + mixture.deviation * noise
    return LatentDataset(clean=clean.float(), class_id=torch.full((count,), -1), cluster_id=cluster_id)


def fit_router(mixture: MixtureOfGaussians, workspace: Workspace, **settings: str) -> Router:
    config, dataset = RouterConfig(kind="nearest_centroid", **settings), make_dataset(mixture)
    counts = dataset.cluster_id.bincount().double().unsqueeze(0)
    model = fit_nearest_centroid(config, dataset, counts, workspace).model
    return Router(model=model, noise_schedule=NOISE_SCHEDULES[config.noise_schedule], prior_counts=counts)


@pytest.mark.parametrize("noise_schedule", ["rectified_flow", "cosine", "linear_beta"])
@pytest.mark.parametrize("t", [0.0, 0.3, 0.7, 0.95, 1.0])
def test_logits_are_exact_for_gaussians_of_equal_variance(noise_schedule: str, t: float) -> None:
    mixture = MixtureOfGaussians(SHARES, deviation=0.6)
    rotation = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    model = NearestCentroidRouter([2], 3, 0, noise_schedule)
    mean = torch.tensor([0.4, -1.0])
    state = {
        "mean": mean,
        "basis": rotation,
        "variances": torch.full((2,), 0.36),
        "centroids": (mixture.means.float() - mean) @ rotation,
        "log_scale": torch.zeros(10),
        "log_prior": torch.tensor([SHARES]).log(),
    }
    model.load_state_dict(state)
    noised, times = 1.5 * torch.randn(50, 2), torch.full((50,), t)
    exact = (
        mixture.router(NOISE_SCHEDULES[noise_schedule])
        .logits(noised.double(), times.double(), Condition.null(50))
        .softmax(-1)
    )
    probability = model(noised, times, torch.zeros(50, dtype=torch.int64)).softmax(-1)
    torch.testing.assert_close(probability.double(), exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize("noise_schedule", ["rectified_flow", "cosine"])
def test_fit_to_spherical_gaussians_gives_the_posterior(noise_schedule: str, workspace: Workspace) -> None:
    """Equal shares on a ring: the covariance has no direction, so only the scales are fitted."""
    mixture = MixtureOfGaussians((1 / 3, 1 / 3, 1 / 3), deviation=0.5)
    router = fit_router(mixture, workspace, noise_schedule=noise_schedule)
    clean = make_dataset(mixture, 500).clean.double()
    for t in (0.05, 0.5, 0.8):
        times = torch.full((500,), t, dtype=torch.float64)
        noised = router.noise_schedule.add_noise(clean, torch.randn(500, 2, dtype=torch.float64), times)
        exact = mixture.router(router.noise_schedule).logits(noised, times, Condition.null(500)).softmax(-1)
        probability = router.logits(noised.float(), times.float(), Condition.null(500)).softmax(-1)
        assert (probability - exact).abs().mean() < 0.02


def test_logits_at_t_1_equal_the_prior(workspace: Workspace) -> None:
    router = fit_router(MixtureOfGaussians(SHARES, deviation=0.5), workspace)
    probability = router.logits(torch.randn(20, 2), torch.ones(20), Condition.null(20)).softmax(-1)
    prior = router.prior_logits(Condition.null(20)).softmax(-1)
    torch.testing.assert_close(probability, prior.float())


def test_logits_of_distant_clusters_are_certain_at_t_0(workspace: Workspace) -> None:
    mixture = MixtureOfGaussians(SHARES, deviation=0.1)
    router, dataset = fit_router(mixture, workspace), make_dataset(mixture, 200)
    probability = router.logits(dataset.clean, torch.zeros(200), Condition.null(200)).softmax(-1)
    assert probability.gather(1, dataset.cluster_id.unsqueeze(1)).min() > 0.99


def test_directions_without_variance_keep_logits_finite(workspace: Workspace) -> None:
    dataset = make_dataset(MixtureOfGaussians(SHARES, deviation=0.2), 500)
    flat = LatentDataset(
        clean=torch.cat([dataset.clean, torch.ones(500, 3)], 1),
        class_id=dataset.class_id,
        cluster_id=dataset.cluster_id,
    )
    counts = torch.tensor([[250.0, 150.0, 100.0]])
    model = fit_nearest_centroid(RouterConfig(kind="nearest_centroid"), flat, counts, workspace).model
    logits = model(flat.clean, torch.zeros(500), torch.zeros(500, dtype=torch.int64))
    assert logits.isfinite().all()
    assert (logits.argmax(-1) == flat.cluster_id).all()


def test_latents_of_too_many_numbers_raise() -> None:
    with pytest.raises(ValueError, match="at most 8192 numbers; these have 12288"):
        NearestCentroidRouter([3, 64, 64], 2, 0, RECTIFIED_FLOW.name)
    assert NearestCentroidRouter([4], 2, 0, COSINE.name).noise_schedule is COSINE
