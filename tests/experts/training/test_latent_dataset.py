from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.config import TrainingConfig
from experts.training.latent_dataset import LatentDataset, bucket_batch, make_batch, sample_indices
from experts.training.parallel.distributed import DataParallelGroup


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


@given(
    counts=st.lists(st.integers(0, 30), min_size=2, max_size=4).filter(sum),
    batch_size=st.integers(1, 12),
    seed=st.integers(0, 3),
)
@settings(max_examples=50, deadline=None)
def test_every_bucket_gets_its_batches_in_its_epochs(counts, batch_size, seed):
    epochs = batch_size  # then the batches end with the epoch
    steps = sum(counts) * epochs // batch_size
    drawn = [bucket_batch(counts, batch_size, seed, step) for step in range(steps)]
    for bucket, count in enumerate(counts):
        numbers = sorted(number for other, number in drawn if other == bucket)
        assert numbers == list(range(count * epochs // batch_size)), "each batch once, so each sample once an epoch"
    for epoch in range(1, epochs):
        ended = sum(count * epoch // batch_size for count in counts)
        before = Counter(bucket for bucket, _ in drawn[:ended])
        assert all(before[bucket] == count * epoch // batch_size for bucket, count in enumerate(counts))


def test_a_batch_has_one_shape_and_its_own_samples():
    shapes, numbers = ((1, 4, 4), (1, 2, 6)), torch.arange(40).float()
    parts = [
        LatentDataset(
            clean=rows[:, None, None, None].expand(-1, *shape),
            class_id=rows.long(),
            cluster_id=torch.zeros(len(rows), dtype=torch.int64),
        ).in_bucket(bucket, shapes)
        for bucket, (rows, shape) in enumerate(zip((numbers[:25], numbers[25:]), shapes, strict=True))
    ]
    dataset = LatentDataset(
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in ("clean", "class_id", "bucket_id")},
        cluster_id=torch.zeros(40, dtype=torch.int64),
        shapes=shapes,
    )
    config, seen = TrainingConfig(batch_size=5, condition_dropout=0), []
    for step in range(8):
        batch = make_batch(dataset, config, step)
        assert batch.clean.shape == batch.noise.shape
        assert tuple(batch.clean.shape[1:]) == shapes[int(batch.condition.class_id[0] >= 25)]
        assert (batch.clean.flatten(1) == batch.condition.class_id[:, None]).all()
        seen += batch.condition.class_id.tolist()
    assert sorted(seen) == list(range(40))
    orders = [[bucket_batch([25, 15], 5, seed, step)[0] for step in range(16)] for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert orders[0][:8] != orders[0][8:], "a new order each epoch"


def test_shift_multiplies_the_odds_of_t(make_dataset):
    plain, shifted = (make_batch(make_dataset(), TrainingConfig(batch_size=40, t_shift=s), 0).t for s in (1.0, 3.0))
    assert torch.allclose(shifted / (1 - shifted), 3 * plain / (1 - plain), rtol=1e-4)
