"""Routers of data with text: every kind sees the text, and the null text gives the branch without a condition."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddm_core.artifacts import Workspace, list_files
from experts.conditions.condition import Condition
from experts.conditions.text_embedding import TextEmbedding
from experts.config import TrainingConfig
from experts.training.latent_dataset import LatentDataset
from router.add_remove import RouterChangeError, add_head, remove_head
from router.calibration import text_prior
from router.calibration.text_prior import fit_text_prior
from router.config import RouterConfig
from router.costs import text_prior_cost
from router.models.registry import ROUTERS
from router.router import Router, count_priors
from router.train import fit_router, router_flops
from tests.router.captioned import WIDTH, make_dataset

TRAINING = TrainingConfig(steps=200, batch_size=64, lr=1e-2, warmup_steps=5, condition_dropout=0.5)


def make_clusters(count: int = 300) -> LatentDataset:
    """Give three clusters of unequal size texts that tell them apart, and latents that do not."""
    generator = torch.Generator().manual_seed(0)
    cluster_id = torch.tensor([0, 0, 0, 1, 1, 2]).repeat(count // 6)[torch.randperm(count, generator=generator)]
    pooled = torch.eye(WIDTH)[cluster_id] + 0.1 * torch.randn(count, WIDTH, generator=generator)
    dataset = make_dataset(pooled, cluster_id)
    return replace(dataset, clean=torch.randn(count, 2, generator=generator))


def train(kind: str, dataset: LatentDataset, folder: Path) -> Router:
    config = RouterConfig(kind=kind, width=16, depth=1, heads=2, tokens=2, training=TRAINING)
    counts = count_priors(dataset.cluster_id, dataset.class_id, 3, 0)
    fit_router(config, dataset, make_clusters(60), folder, Workspace.at(folder.parent / "work"), counts)
    return Router.load(folder)


def text_condition(cluster_id: list[int]) -> Condition:
    return make_dataset(torch.eye(WIDTH)[cluster_id], torch.tensor(cluster_id)).condition(torch.arange(len(cluster_id)))


@pytest.mark.parametrize("kind", list(ROUTERS))
def test_every_kind_sees_the_text_and_the_null_text(kind: str, tmp_path: Path) -> None:
    router = train(kind, make_clusters(), tmp_path / "router")
    noised, t = torch.randn(4, 2), torch.tensor([0.1, 0.5, 0.9, 1.0])
    condition = text_condition([2, 2, 2, 2])
    assert (router.logits(noised, t, condition).softmax(-1)[:, 2] > 0.6).all()
    null = router.logits(noised, t, Condition.null(4))
    assert (null.softmax(-1)[:, 2] < 0.4).all()
    dropped = router.logits(noised, t, condition.drop(torch.ones(4, dtype=torch.bool)))
    assert torch.equal(dropped, null)


@pytest.mark.parametrize("kind", list(ROUTERS))
def test_every_kind_survives_its_folder(kind: str, tmp_path: Path) -> None:
    router = train(kind, make_clusters(60), tmp_path / "router")
    router.save(tmp_path / "again")
    for file in list_files(tmp_path / "again"):
        assert file.read_bytes() == (tmp_path / "router" / file.name).read_bytes(), file.name
    again, condition = Router.load(tmp_path / "again"), text_condition([0, 1, 2])
    noised, t = torch.randn(3, 2), torch.rand(3)
    assert torch.equal(again.logits(noised, t, condition), router.logits(noised, t, condition))
    assert torch.equal(again.prior_logits(condition), router.prior_logits(condition))


def test_prior_of_texts_is_sharp_and_that_of_null_counts(tmp_path: Path) -> None:
    router = train("prior_table", make_clusters(), tmp_path / "router")
    condition = Condition.concatenate([text_condition([0, 1, 2]), Condition.null(1)])
    prior = router.prior_logits(condition).softmax(-1)
    assert (prior[:3].diagonal() > 0.9).all()
    torch.testing.assert_close(prior[3], torch.tensor([0.5, 1 / 3, 1 / 6], dtype=torch.float64))
    present = torch.tensor([True, False, True])
    masked = router.prior_logits(condition, present).softmax(-1)
    assert not masked[:, 1].any()
    torch.testing.assert_close(masked, prior * present / (prior * present).sum(1, keepdim=True))


def test_quality_reports_the_prior_of_texts(tmp_path: Path) -> None:
    dataset = make_clusters()
    counts = count_priors(dataset.cluster_id, dataset.class_id, 3, 0)
    config = RouterConfig(kind="prior_table")
    quality = fit_router(config, dataset, make_clusters(60), tmp_path / "out", Workspace.at(tmp_path), counts).quality
    assert quality.prior_cross_entropy is not None
    assert quality.prior_cross_entropy < quality.prior_entropy_null - 0.3
    assert quality.prior_entropy == pytest.approx(quality.prior_cross_entropy, abs=0.05)
    assert quality.bins[-1].cross_entropy == pytest.approx(quality.prior_cross_entropy, abs=1e-3)
    assert quality.bins[-1].cross_entropy_null == pytest.approx(quality.prior_entropy_null, abs=0.1)


def test_flops_of_the_prior_are_counted_and_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluations, cross_entropy = [], text_prior._cross_entropy
    monkeypatch.setattr(text_prior, "_cross_entropy", lambda *args: evaluations.append(1) or cross_entropy(*args))
    dataset, config = make_clusters(), RouterConfig(kind="mlp", width=16, depth=1, training=TRAINING)
    counts = count_priors(dataset.cluster_id, dataset.class_id, 3, 0)
    summary = fit_router(config, dataset, make_clusters(60), tmp_path / "out", Workspace.at(tmp_path), counts)
    prior = text_prior_cost(300, WIDTH, 0, 3)
    assert 3 * 2 * 300 * WIDTH * 3 * len(evaluations) <= prior
    without = router_flops(config, (2,), 0, 3, dataset.null_text)
    assert summary.flops == router_flops(config, (2,), 0, 3, dataset.null_text, 300) == without + prior


def test_texts_of_another_encoder_raise(tmp_path: Path) -> None:
    router = train("mlp", make_clusters(60), tmp_path / "router")
    other = TextEmbedding(
        torch.zeros(1, 2, 1), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, WIDTH + 1), torch.tensor([False])
    )
    condition = Condition(torch.tensor([-1]), other)
    for call in (router.prior_logits, lambda rows: router.logits(torch.zeros(1, 2), torch.zeros(1), rows)):
        with pytest.raises(ValueError, match="use its text encoder"):
            call(condition)


def test_added_expert_has_the_texts_of_its_captions(tmp_path: Path) -> None:
    dataset, is_new = make_clusters(), torch.tensor([2])
    old = dataset.select((dataset.cluster_id != is_new).nonzero().squeeze(-1))
    cluster = dataset.select((dataset.cluster_id == is_new).nonzero().squeeze(-1))
    config = RouterConfig(kind="density_ratio", width=16, depth=1, training=TRAINING)
    counts = count_priors(old.cluster_id, old.class_id, 2, 0)
    fit_router(config, old, old, tmp_path / "router", Workspace.at(tmp_path / "work"), counts)
    router = Router.load(tmp_path / "router")
    extended = add_head(router, cluster, old, TRAINING, Workspace.at(tmp_path / "more")).router
    assert (extended.prior_logits(text_condition([0, 1, 2])).softmax(-1).diagonal() > 0.8).all()
    noised, t = torch.randn(3, 2), torch.full((3,), 0.9)
    assert (extended.logits(noised, t, text_condition([0, 1, 2])).softmax(-1).diagonal() > 0.6).all()
    together = fit_text_prior(dataset, 3, 0)
    assert together is not None and extended.text_prior is not None
    torch.testing.assert_close(
        extended.text_prior.logits(text_condition([0, 1, 2])).softmax(-1),
        together.logits(text_condition([0, 1, 2])).softmax(-1),
        rtol=0,
        atol=0.05,
    )
    with pytest.raises(RouterChangeError, match="none of the new samples has a caption"):
        add_head(router, replace(cluster, captions=None), old, TRAINING, Workspace.at(tmp_path / "none"))
    with pytest.raises(RouterChangeError, match="those of experts 2 … 2 are not part of the run"):
        add_head(extended, cluster, old, TRAINING, Workspace.at(tmp_path / "third"))


def test_experts_can_be_removed(tmp_path: Path) -> None:
    dataset = make_clusters(60)
    router = train("density_ratio", dataset, tmp_path / "router")
    reduced, condition = remove_head(router, 1), text_condition([0, 2])
    noised, t = torch.randn(2, 2), torch.rand(2)
    for before, after in (
        (router.prior_logits(condition), reduced.prior_logits(condition)),
        (router.logits(noised, t, condition), reduced.logits(noised, t, condition)),
    ):
        torch.testing.assert_close(after.softmax(-1), before[:, [0, 2]].softmax(-1))
