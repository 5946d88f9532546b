from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.config import TrainingConfig
from experts.training.distributed import DataParallelGroup
from experts.training.latent_dataset import LatentDataset, make_batch, sample_indices


@given(count=st.integers(1, 40), batch_size=st.integers(1, 100), seed=st.integers(-5, 5), epochs=st.integers(1, 4))
@settings(max_examples=50)
def test_every_sample_occurs_once_an_epoch(count, batch_size, seed, epochs):
    steps = -(-epochs * count // batch_size)
    samples = torch.cat([sample_indices(count, batch_size, seed, step) for step in range(steps)])
    for epoch in range(epochs):
        assert sorted(samples[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))


@pytest.mark.parametrize("size", [2, 4])
def test_local_rows_partition_the_batch(size, make_dataset):
    dataset, config = make_dataset(shape=(1, 3, 3)), TrainingConfig(batch_size=8, condition_dropout=0.5)
    batch = make_batch(dataset, config, 5)
    parts = [make_batch(dataset, config, 5, DataParallelGroup(rank, size).local_rows(8)) for rank in range(size)]
    assert [len(part.t) for part in parts] == [8 // size] * size
    for field in ("clean", "noise", "t", "cluster_id"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(batch, field))
    assert torch.equal(torch.cat([part.condition.class_id for part in parts]), batch.condition.class_id)


def test_batch_depends_on_seed_and_step_only(make_dataset):
    dataset, config = make_dataset(), TrainingConfig(batch_size=8, seed=3)
    first = make_batch(dataset, config, 7)
    make_batch(dataset, config, 8)
    torch.manual_seed(99)
    repeated = make_batch(dataset, config, 7)
    for name in ("clean", "noise", "t", "cluster_id"):
        assert torch.equal(getattr(first, name), getattr(repeated, name))
    assert torch.equal(first.condition.class_id, repeated.condition.class_id)
    for other in (make_batch(dataset, config, 8), make_batch(dataset, TrainingConfig(batch_size=8, seed=4), 7)):
        assert not torch.equal(first.noise, other.noise)
        assert not torch.equal(first.t, other.t)


def test_batch_rows_keep_their_class_and_cluster():
    count = 30
    dataset = LatentDataset(
        clean=torch.arange(count).float()[:, None],
        class_id=torch.arange(count) % 5,
        cluster_id=torch.arange(count) % 3,
    )
    batch = make_batch(dataset, TrainingConfig(batch_size=64, condition_dropout=0), 0)
    sample = batch.clean[:, 0].long()
    assert torch.equal(batch.condition.class_id, sample % 5)
    assert torch.equal(batch.cluster_id, sample % 3)
    assert max(Counter(sample.tolist()).values()) == 3, "64 of 30 samples: two full epochs and four more"


def test_t_is_logit_normal_and_noise_is_standard_normal(make_dataset):
    config = TrainingConfig(batch_size=20_000, t_mean=-0.4, t_std=0.7)
    batch = make_batch(make_dataset(), config, 0)
    logits = batch.t.logit()
    assert logits.mean().item() == pytest.approx(-0.4, abs=0.02)
    assert logits.std().item() == pytest.approx(0.7, abs=0.02)
    assert batch.noise.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_conditions_are_dropped_at_the_configured_rate(make_dataset, share):
    batch = make_batch(make_dataset(), TrainingConfig(batch_size=10_000, condition_dropout=share), 0)
    null = (batch.condition.class_id == -1).float().mean().item()
    assert null == pytest.approx(share, abs=0.0 if share in (0, 1) else 0.02)
