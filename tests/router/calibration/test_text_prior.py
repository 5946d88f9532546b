from pathlib import Path

import pytest
import torch

from ddm_core.artifacts import CorruptArtifact
from experts.conditions.condition import Condition
from experts.training.latent_dataset import LatentDataset
from router.calibration.ece import calibration_error, calibration_error_floor
from router.calibration.text_prior import TextPrior, fit_text_prior
from tests.router.captioned import WIDTH, make_dataset

SLOPES = 1.5 * torch.tensor([[1.0, 0, 0, 0, 0], [-1, 0, 0, 0, 0], [0, 1, 0, 0, 0]])
OFFSETS = torch.tensor([0.5, 0.0, -0.5])


def draw(count: int, seed: int = 0) -> LatentDataset:
    """Draw the cluster of every text from a known softmax; pooled vectors are neither centered nor of unit scale."""
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(count, WIDTH, generator=generator)
    probability = (pooled @ SLOPES.T + OFFSETS).softmax(-1)
    cluster_id = torch.multinomial(probability, 1, generator=generator).squeeze(1)
    return make_dataset(3 + 0.1 * pooled, cluster_id)


def condition_of(dataset: LatentDataset) -> Condition:
    return dataset.condition(torch.arange(len(dataset)))


def test_fit_finds_the_posterior_of_texts_and_is_calibrated() -> None:
    prior, held_out = fit_text_prior(draw(4000), 3, 0), draw(2000, seed=1)
    probability = prior.logits(condition_of(held_out)).softmax(-1)
    exact = (10 * (held_out.captions.pooled - 3) @ SLOPES.T + OFFSETS).softmax(-1)
    assert (probability - exact).abs().mean() < 0.02
    floor = calibration_error_floor(probability, 1, 0)
    assert calibration_error(probability, held_out.cluster_id) < floor + 0.01


def test_few_texts_of_random_clusters_are_not_trusted() -> None:
    """40 texts are separable by 200 numbers, but their clusters are random: the fit stays near the shares."""
    generator = torch.Generator().manual_seed(0)
    pooled = torch.randn(40, WIDTH, generator=generator)
    prior = fit_text_prior(make_dataset(pooled, torch.arange(40) % 2), 2, 0)
    unseen = condition_of(
        make_dataset(torch.randn(200, WIDTH, generator=generator), torch.zeros(200, dtype=torch.long))
    )
    assert (prior.logits(unseen).softmax(-1) - 0.5).abs().mean() < 0.15


def test_class_counts_where_the_text_says_nothing() -> None:
    pooled, cluster_id = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(0)), torch.arange(400) % 2
    prior = fit_text_prior(make_dataset(pooled, cluster_id, class_id=cluster_id), 2, 2)
    text = condition_of(make_dataset(pooled[:3], cluster_id[:3])).text
    probability = prior.logits(Condition(torch.tensor([0, 1, -1]), text)).softmax(-1)
    torch.testing.assert_close(probability[:, 0], torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64), atol=0.1, rtol=0)


def test_cluster_without_samples_is_impossible() -> None:
    dataset = draw(100)
    probability = fit_text_prior(dataset, 4, 0).logits(condition_of(dataset)).softmax(-1)
    assert probability.isfinite().all()
    assert not probability[:, 3].any()


def test_fit_is_deterministic_and_survives_a_file(tmp_path: Path) -> None:
    first, second = (fit_text_prior(draw(200), 3, 0) for _ in range(2))
    first.save(tmp_path / "prior.safetensors")
    loaded = TextPrior.load(tmp_path / "prior.safetensors")
    assert torch.equal(loaded.slopes, second.slopes)
    assert torch.equal(loaded.offsets, second.offsets)
    (tmp_path / "prior.safetensors").write_bytes(b"{}")
    with pytest.raises(CorruptArtifact, match="train the router again"):
        TextPrior.load(tmp_path / "prior.safetensors")


def test_removed_expert_leaves_the_others_renormalized() -> None:
    dataset = draw(200)
    prior = fit_text_prior(dataset, 3, 0)
    expected = prior.logits(condition_of(dataset))[:, [0, 2]].softmax(-1)
    torch.testing.assert_close(prior.without(1).logits(condition_of(dataset)).softmax(-1), expected)


def test_data_without_captions_have_no_prior_of_texts() -> None:
    dataset = draw(10).without_conditions()
    assert fit_text_prior(dataset, 3, 0) is None
