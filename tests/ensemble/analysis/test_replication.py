"""Losses tell members from others exactly as far as the expert has memorized them; limits fail by name."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from ddm_core.artifacts import read_json
from ensemble.analysis import replication
from ensemble.analysis.replication import (
    ReplicationError,
    auc_error,
    check_replication,
    membership_auc,
    sample_losses,
)
from ensemble.config import EvaluationConfig, ReplicationLimits
from ensemble.evaluation.scoring import Reference
from experts.codec import PixelCodec
from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import RECTIFIED_FLOW, expand
from experts.training.latent_dataset import LatentDataset
from tests.oracles import MixtureOfGaussians

GENERATOR = torch.Generator().manual_seed(0)


def latents(count: int) -> LatentDataset:
    nothing = torch.zeros(count, dtype=torch.int64)
    return LatentDataset(clean=torch.randn(count, 8, generator=GENERATOR), class_id=nothing - 1, cluster_id=nothing)


MEMBERS, OTHERS = latents(60), latents(60)


def kernel_velocity(width: float) -> object:
    """Return the exact velocity of the training data, each smoothed by a Gaussian: 0 memorizes, 1 is wide."""

    def velocity(noised: Tensor, t: Tensor, _condition: Condition) -> Tensor:
        t = expand(t, noised)
        variance = (1 - t) ** 2 * width**2 + t**2
        residual = noised[:, None] - (1 - t[:, None]) * MEMBERS.clean
        weight = (-residual.square().sum(2) / (2 * variance)).softmax(1)[:, :, None]
        clean = MEMBERS.clean + ((1 - t) * width**2 / variance)[:, None] * residual
        noise = (t / variance)[:, None] * residual
        return (weight * (noise - clean)).sum(1)

    return velocity


def test_auc_grows_with_memorization() -> None:
    values = [
        membership_auc(*(sample_losses(kernel_velocity(width), part, RECTIFIED_FLOW) for part in (MEMBERS, OTHERS)))
        for width in (0.05, 0.6, 3.0)
    ]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.95 and abs(values[-1] - 0.5) < 3 * auc_error(0.5, 60, 60)


def test_auc_counts_pairs_and_ties() -> None:
    assert membership_auc(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0])) == 3.5 / 4


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Return the folders of 100 samples, all of expert 1 at distance .1, where held-out images are at 1 … 2."""
    np.save(tmp_path / "images.npy", np.zeros((100, 4, 4, 1), np.uint8))
    loaded = SimpleNamespace(copy_distances=lambda _pixels: (np.full(100, 0.1), np.linspace(1, 2, 200)))
    monkeypatch.setattr(Reference, "load", lambda *_: loaded)
    assign = SimpleNamespace(assign_images=lambda images: np.ones(len(images), np.int64))
    monkeypatch.setattr(replication, "load_partition", lambda _: assign)
    ensemble = SimpleNamespace(experts=MixtureOfGaussians((0.5, 0.5)).experts(), noise_schedule=RECTIFIED_FLOW)
    pipeline = SimpleNamespace(
        from_pretrained=lambda _: SimpleNamespace(ensemble=ensemble, codec=PixelCodec(image_shape=(2, 2, 1)))
    )
    monkeypatch.setattr(replication, "EnsemblePipeline", pipeline)
    return (tmp_path,) * 4


def test_limit_names_the_expert_and_the_way_out(folders) -> None:
    with pytest.raises(ReplicationError, match=r"^100.0% of the samples of expert 1 .*data.duplicates=remove"):
        check_replication(*folders, EvaluationConfig(), ReplicationLimits(max_copy_rate=0.2))
    experts = read_json(folders[0] / "replication.json")["experts"]
    assert [row["copies"] is None for row in experts] == [True, False]


def test_without_a_limit_it_is_only_measured(folders) -> None:
    rows = check_replication(*folders, EvaluationConfig(), ReplicationLimits(max_membership_auc=0.6))
    assert rows[1].copies is not None and rows[1].copies.share == 1 and rows[1].membership_auc is None
