from pathlib import Path

import pytest
import torch

from ddm_core.artifacts import Workspace
from experts.condition import Condition
from experts.config import TrainingConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.training.latent_dataset import LatentDataset
from router.config import RouterConfig
from router.models.density_ratio import balanced, fit_ratios, of_cluster, share_of_batch
from router.router import Router, count_priors
from tests.oracles import MixtureOfGaussians

MIXTURE = MixtureOfGaussians((0.8, 0.2), deviation=0.5, radius=1.0)


def data(count: int, class_id: int = -1) -> LatentDataset:
    generator = torch.Generator().manual_seed(0)
    cluster_id = (torch.arange(count) % 5 == 4).long()
    clean = MIXTURE.means[cluster_id] + 0.5 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return LatentDataset(clean=clean.float(), class_id=torch.full((count,), class_id), cluster_id=cluster_id)


def fitted(dataset: LatentDataset, workspace: Workspace, steps: int, checkpoint_every: int = 10_000) -> Router:
    """Every head has 128 rows a step, however many there are."""
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
    model = fit_ratios(config, dataset, counts, workspace).model
    return Router(model=model, noise_schedule=RECTIFIED_FLOW, prior_counts=counts)


@pytest.mark.slow
def test_heads_give_the_log_ratio_and_all_together_the_posterior(workspace: Workspace) -> None:
    dataset = data(5000)
    router = fitted(dataset, workspace, 600)
    rows = torch.arange(0, 5000, 10)
    for t in (0.2, 0.5, 0.8):
        times = torch.full((500,), t)
        noised = RECTIFIED_FLOW.add_noise(dataset.clean[rows], torch.randn(500, 2), times)
        joint = MIXTURE.router().logits(noised.double(), times.double(), Condition.null(500))
        exact = joint - torch.tensor([0.8, 0.2]).log() - joint.logsumexp(-1, keepdim=True)
        heads = [head(noised, times, torch.zeros(500, dtype=torch.int64)) for head in router.model.heads]
        close = exact.abs() < 2
        assert (torch.cat(heads, 1) - exact)[close].abs().mean() < 0.15
        said = router.logits(noised, times, Condition.null(500)).softmax(-1)
        assert (said - joint.softmax(-1)).abs().mean() < 0.05


def heads_of(router: Router) -> list[dict[str, torch.Tensor]]:
    return [head.state_dict() for head in router.model.heads]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_head_knows_nothing_of_how_the_others_are_divided(workspace: Workspace, tmp_path: Path) -> None:
    """The second cluster in two parts: the first head is the same to the bit."""
    dataset = data(200)
    halves = dataset.cluster_id * (1 + torch.arange(200) // 100)
    divided = LatentDataset(clean=dataset.clean, class_id=dataset.class_id, cluster_id=halves)
    two = heads_of(fitted(dataset, workspace, 3))
    three = heads_of(fitted(divided, Workspace.at(tmp_path / "other"), 3))
    assert (len(two), len(three)) == (2, 3)
    assert equal(two[0], three[0])
    assert not equal(two[1], three[1])


def test_a_head_does_not_go_on_from_another_ones_checkpoint(workspace: Workspace, tmp_path: Path) -> None:
    plain = heads_of(fitted(data(100), workspace, 4))
    saved = heads_of(fitted(data(100), Workspace.at(tmp_path / "other"), 4, checkpoint_every=2))
    assert equal(plain[0], saved[0])
    assert equal(plain[1], saved[1])


def test_both_come_as_often() -> None:
    dataset = data(100)
    both = balanced(of_cluster(dataset, 1), dataset, 1000)
    assert both.cluster_id.bincount().tolist() == [100, 100]
    ones = both.clean[both.cluster_id == 1]
    assert {tuple(row) for row in ones.tolist()} == {tuple(row) for row in of_cluster(dataset, 1).clean.tolist()}
    assert torch.equal(both.clean[both.cluster_id == 0], dataset.clean)


def test_no_more_are_held_than_are_needed_and_they_are_spread() -> None:
    dataset = data(100)
    both = balanced(data(400), dataset, 20)
    assert both.cluster_id.bincount().tolist() == [20, 20]
    assert torch.equal(both.clean[both.cluster_id == 0], dataset.clean[::5])
    assert torch.equal(both.clean[both.cluster_id == 1], data(400).clean[::20])


def test_the_prior_of_the_class_is_added(workspace: Workspace) -> None:
    router = fitted(data(100), workspace, 1)
    noised, t = torch.randn(4, 2), torch.rand(4)
    heads = torch.cat([head(noised, t, torch.zeros(4, dtype=torch.int64)) for head in router.model.heads], 1)
    expected = heads + torch.tensor([[0.8, 0.2]]).log()
    torch.testing.assert_close(router.logits(noised, t, Condition.null(4)), expected)


def test_a_cluster_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="cluster 2 has none"):
        of_cluster(data(10), 2)


def test_heads_share_the_batch() -> None:
    assert share_of_batch(TrainingConfig(batch_size=256), 8).batch_size == 32
    assert share_of_batch(TrainingConfig(batch_size=4), 8).batch_size == 2
