import pytest
import torch

from ddm_core.artifacts import Workspace
from experts.condition import Condition
from experts.diffusion.noise_schedule import COSINE, NOISE_SCHEDULES, RECTIFIED_FLOW
from experts.training.latent_dataset import LatentDataset
from router.config import RouterConfig
from router.models.nearest_centroid import NearestCentroidRouter, fit_centroids
from router.router import Router
from tests.oracles import MixtureOfGaussians

SHARES = (0.5, 0.3, 0.2)


def data(mixture: MixtureOfGaussians, count: int = 3000) -> LatentDataset:
    generator = torch.Generator().manual_seed(0)
    shares = torch.tensor(mixture.shares)
    cluster_id = torch.multinomial(shares, count, replacement=True, generator=generator)
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    clean = mixture.means[cluster_id] + mixture.deviation * noise
    return LatentDataset(clean=clean.float(), class_id=torch.full((count,), -1), cluster_id=cluster_id)


def fitted(mixture: MixtureOfGaussians, workspace: Workspace, **chosen: str) -> Router:
    config, dataset = RouterConfig(kind="nearest_centroid", **chosen), data(mixture)
    counts = dataset.cluster_id.bincount().double().unsqueeze(0)
    model = fit_centroids(config, dataset, counts, workspace).model
    return Router(model=model, noise_schedule=NOISE_SCHEDULES[config.noise_schedule], prior_counts=counts)


@pytest.mark.parametrize("path", ["rectified_flow", "cosine", "linear_beta"])
@pytest.mark.parametrize("t", [0.0, 0.3, 0.7, 0.95, 1.0])
def test_it_is_the_exact_posterior_of_gaussians_of_the_denoisers_own_variance(path: str, t: float) -> None:
    mixture = MixtureOfGaussians(SHARES, deviation=0.6)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    model = NearestCentroidRouter([2], 3, 0, path)
    mean = torch.tensor([0.4, -1.0])
    state = {
        "mean": mean,
        "basis": turn,
        "variances": torch.full((2,), 0.36),
        "centroids": (mixture.means.float() - mean) @ turn,
        "log_scale": torch.zeros(10),
        "log_prior": torch.tensor([SHARES]).log(),
    }
    model.load_state_dict(state)
    noised, times = 1.5 * torch.randn(50, 2), torch.full((50,), t)
    exact = (
        mixture.router(NOISE_SCHEDULES[path]).logits(noised.double(), times.double(), Condition.null(50)).softmax(-1)
    )
    said = model(noised, times, torch.zeros(50, dtype=torch.int64)).softmax(-1)
    torch.testing.assert_close(said.double(), exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize("path", ["rectified_flow", "cosine"])
def test_fitted_to_spherical_gaussians_it_finds_the_posterior(path: str, workspace: Workspace) -> None:
    """Equal shares on a ring: the covariance has no direction, so only the scales have to be found."""
    mixture = MixtureOfGaussians((1 / 3, 1 / 3, 1 / 3), deviation=0.5)
    router = fitted(mixture, workspace, noise_schedule=path)
    clean = data(mixture, 500).clean.double()
    for t in (0.05, 0.5, 0.8):
        times = torch.full((500,), t, dtype=torch.float64)
        noised = router.noise_schedule.add_noise(clean, torch.randn(500, 2, dtype=torch.float64), times)
        exact = mixture.router(router.noise_schedule).logits(noised, times, Condition.null(500)).softmax(-1)
        said = router.logits(noised.float(), times.float(), Condition.null(500)).softmax(-1)
        assert (said - exact).abs().mean() < 0.02


def test_at_t_1_it_is_the_prior(workspace: Workspace) -> None:
    router = fitted(MixtureOfGaussians(SHARES, deviation=0.5), workspace)
    said = router.logits(torch.randn(20, 2), torch.ones(20), Condition.null(20)).softmax(-1)
    prior = router.prior_logits(Condition.null(20)).softmax(-1)
    torch.testing.assert_close(said, prior.float())


def test_far_apart_it_is_sure_at_t_0(workspace: Workspace) -> None:
    mixture = MixtureOfGaussians(SHARES, deviation=0.1)
    router, dataset = fitted(mixture, workspace), data(mixture, 200)
    said = router.logits(dataset.clean, torch.zeros(200), Condition.null(200)).softmax(-1)
    assert said.gather(1, dataset.cluster_id.unsqueeze(1)).min() > 0.99


def test_directions_without_variance_do_no_harm(workspace: Workspace) -> None:
    dataset = data(MixtureOfGaussians(SHARES, deviation=0.2), 500)
    flat = LatentDataset(
        clean=torch.cat([dataset.clean, torch.ones(500, 3)], 1),
        class_id=dataset.class_id,
        cluster_id=dataset.cluster_id,
    )
    counts = torch.tensor([[250.0, 150.0, 100.0]])
    model = fit_centroids(RouterConfig(kind="nearest_centroid"), flat, counts, workspace).model
    said = model(flat.clean, torch.zeros(500), torch.zeros(500, dtype=torch.int64))
    assert said.isfinite().all()
    assert (said.argmax(-1) == flat.cluster_id).all()


def test_latents_of_too_many_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 8192 numbers; these have 12288"):
        NearestCentroidRouter([3, 64, 64], 2, 0, RECTIFIED_FLOW.name)
    assert NearestCentroidRouter([4], 2, 0, COSINE.name).path is COSINE
