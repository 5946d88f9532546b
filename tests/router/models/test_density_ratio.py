from pathlib import Path

import pytest
import torch

from ddm_core.artifacts import Workspace
from experts.conditions.condition import Condition
from experts.config import TrainingConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.training.latent_dataset import LatentDataset
from router.config import RouterConfig
from router.models.density_ratio import balance, divide_batch, fit_density_ratio, select_cluster
from router.router import Router, count_priors
from tests.oracles import MixtureOfGaussians

MIXTURE = MixtureOfGaussians((0.8, 0.2), deviation=0.5, radius=1.0)


def make_dataset(count: int, class_id: int = -1) -> LatentDataset:
    generator = torch.Generator().manual_seed(0)
    cluster_id = (torch.arange(count) % 5 == 4).long()
    clean = MIXTURE.means[cluster_id] + 0.5 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return LatentDataset(clean=clean.float(), class_id=torch.full((count,), class_id), cluster_id=cluster_id)


def fit_router(dataset: LatentDataset, workspace: Workspace, steps: int, checkpoint_every: int = 10_000) -> Router:
    """Fit a router; every head has 128 rows per step, independent of the number of heads."""
    num_experts = int(dataset.cluster_id.amax()) + 1
    training = TrainingConfig(
        steps=steps,
        batch_size=128 * num_experts,
        lr=5e-3,
        warmup_steps=5,
        t_std=1.4,
        checkpoint_every=checkpoint_every,
    )
    config = RouterConfig(kind="density_ratio", width=16, depth=1, training=training)
    counts = count_priors(dataset.cluster_id, dataset.class_id, num_experts, 0)
    model = fit_density_ratio(config, dataset, counts, workspace).model
    return Router(model=model, noise_schedule=RECTIFIED_FLOW, prior_counts=counts)


@pytest.mark.slow
def test_heads_learn_log_ratios_and_together_the_posterior(workspace: Workspace) -> None:
    dataset = make_dataset(4000)
    router = fit_router(dataset, workspace, 400)
    rows = torch.arange(0, 4000, 8)
    for t in (0.2, 0.5, 0.8):
        times = torch.full((500,), t)
        noised = RECTIFIED_FLOW.add_noise(dataset.clean[rows], torch.randn(500, 2), times)
        joint = MIXTURE.router().logits(noised.double(), times.double(), Condition.null(500))
        exact = joint - torch.tensor([0.8, 0.2]).log() - joint.logsumexp(-1, keepdim=True)
        heads = [head(noised, times, torch.zeros(500, dtype=torch.int64)) for head in router.model.heads]
        close = exact.abs() < 2
        assert (torch.cat(heads, 1) - exact)[close].abs().mean() < 0.15
        probability = router.logits(noised, times, Condition.null(500)).softmax(-1)
        assert (probability - joint.softmax(-1)).abs().mean() < 0.05


def head_states(router: Router) -> list[dict[str, torch.Tensor]]:
    return [head.state_dict() for head in router.model.heads]


def are_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_head_is_independent_of_other_clusters(workspace: Workspace, tmp_path: Path) -> None:
    """Split the second cluster in two: the first head is bit-identical."""
    dataset = make_dataset(200)
    split_ids = dataset.cluster_id * (1 + torch.arange(200) // 100)
    split = LatentDataset(clean=dataset.clean, class_id=dataset.class_id, cluster_id=split_ids)
    without_split = head_states(fit_router(dataset, workspace, 3))
    with_split = head_states(fit_router(split, Workspace.at(tmp_path / "other"), 3))
    assert (len(without_split), len(with_split)) == (2, 3)
    assert are_equal(without_split[0], with_split[0])
    assert not are_equal(without_split[1], with_split[1])


def test_head_does_not_resume_from_checkpoint_of_another(workspace: Workspace, tmp_path: Path) -> None:
    plain = head_states(fit_router(make_dataset(100), workspace, 4))
    saved = head_states(fit_router(make_dataset(100), Workspace.at(tmp_path / "other"), 4, checkpoint_every=2))
    assert are_equal(plain[0], saved[0])
    assert are_equal(plain[1], saved[1])


def test_balance_has_equal_numbers_of_both() -> None:
    dataset = make_dataset(100)
    both = balance(select_cluster(dataset, 1), dataset, 1000)
    assert both.cluster_id.bincount().tolist() == [100, 100]
    positives = both.clean[both.cluster_id == 1]
    assert {tuple(row) for row in positives.tolist()} == {
        tuple(row) for row in select_cluster(dataset, 1).clean.tolist()
    }
    assert torch.equal(both.clean[both.cluster_id == 0], dataset.clean)


def test_balance_limit_spreads_the_selected_samples() -> None:
    dataset = make_dataset(100)
    both = balance(make_dataset(400), dataset, 20)
    assert both.cluster_id.bincount().tolist() == [20, 20]
    assert torch.equal(both.clean[both.cluster_id == 0], dataset.clean[::5])
    assert torch.equal(both.clean[both.cluster_id == 1], make_dataset(400).clean[::20])


def test_logits_include_the_class_prior(workspace: Workspace) -> None:
    router = fit_router(make_dataset(100), workspace, 1)
    noised, t = torch.randn(4, 2), torch.rand(4)
    heads = torch.cat([head(noised, t, torch.zeros(4, dtype=torch.int64)) for head in router.model.heads], 1)
    expected = heads + torch.tensor([[0.8, 0.2]]).log()
    torch.testing.assert_close(router.logits(noised, t, Condition.null(4)), expected)


def test_cluster_without_samples_raises() -> None:
    with pytest.raises(ValueError, match="cluster 2 has none"):
        select_cluster(make_dataset(10), 2)


def test_heads_share_the_batch() -> None:
    assert divide_batch(TrainingConfig(batch_size=256), 8).batch_size == 32
    assert divide_batch(TrainingConfig(batch_size=4), 8).batch_size == 2
