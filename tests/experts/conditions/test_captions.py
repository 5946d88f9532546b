from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.conditions.captions import EncodedCaptions
from experts.conditions.text_embedding import TextEmbedding
from experts.config import ResidualMLPConfig, TrainingConfig
from experts.networks.registry import build_network, call_network
from experts.training.latent_dataset import LatentDataset, make_batch

LENGTH, WIDTH, POOLED = 6, 3, 2


def make_captions(tokens_of_samples, weights=None):
    """Encode captions with their number as every feature; an entry lists the tokens of each caption of a sample."""
    tokens = [count for sample in tokens_of_samples for count in sample]
    numbers = torch.arange(1, len(tokens) + 1).float()
    first = torch.tensor([0, *tokens]).cumsum(0)
    null_text = TextEmbedding(
        torch.zeros(1, LENGTH, WIDTH), torch.arange(LENGTH)[None] < 2, torch.zeros(1, POOLED), torch.ones(1) > 0
    )
    return EncodedCaptions(
        token_features=numbers.repeat_interleave(torch.tensor(tokens, dtype=torch.long))[:, None].expand(-1, WIDTH),
        first_token=first,
        pooled=numbers[:, None].expand(-1, POOLED),
        weight=torch.ones(len(tokens)) if weights is None else torch.tensor(weights),
        first_caption=torch.tensor([0, *map(len, tokens_of_samples)]).cumsum(0),
        null_text=null_text,
    )


def make_dataset(captions):
    count = len(captions)
    ids = torch.arange(count)
    return LatentDataset(
        clean=torch.randn(count, 4), class_id=torch.full((count,), -1), cluster_id=ids % 2, captions=captions
    )


def test_a_gathered_caption_is_padded_and_masked():
    captions = make_captions([[2], [], [4, 1]])
    positions, has_caption = captions.choose(torch.tensor([2, 1, 0]), torch.zeros(3))
    text = captions.gather(positions, has_caption)
    assert positions.tolist() == [1, 0, 0]
    assert text.is_null.tolist() == [False, True, False]
    assert text.mask.sum(1).tolist() == [4, 0, 2]
    assert text.sequence[:, :, 0].sum(1).tolist() == [8.0, 0.0, 2.0]
    assert text.pooled[:, 0].tolist() == [2.0, 0.0, 1.0]


def test_captions_are_drawn_by_weight():
    captions = make_captions([[1, 1, 1]], weights=[1.0, 2.0, 1.0])
    uniforms = torch.tensor([0.0, 0.24, 0.26, 0.74, 0.76, 0.999])
    positions, _ = captions.choose(torch.zeros(6, dtype=torch.long), uniforms)
    assert positions.tolist() == [0, 0, 1, 1, 2, 2]


@given(
    st.lists(st.lists(st.integers(1, LENGTH), max_size=3), min_size=1, max_size=6).filter(any),
    st.data(),
)
def test_selected_samples_keep_their_captions(tokens_of_samples, data):
    captions = make_captions(tokens_of_samples)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(tokens_of_samples) - 1), min_size=1, max_size=6)))
    uniforms = torch.rand(len(rows))
    selected = captions.select(rows)
    before = captions.gather(*captions.choose(rows, uniforms))
    after = selected.gather(*selected.choose(torch.arange(len(rows)), uniforms))
    assert torch.equal(before.sequence, after.sequence)
    assert torch.equal(before.is_null, after.is_null)
    assert torch.equal(before.pooled, after.pooled)


def test_a_batch_depends_on_seed_and_step_and_drops_texts():
    dataset = make_dataset(make_captions([[1, 2, 3]] * 8))
    config = TrainingConfig(batch_size=8, condition_dropout=0.5)
    first, again = (make_batch(dataset, config, 3).condition.text for _ in range(2))
    assert torch.equal(first.sequence, again.sequence)
    assert 0 < int(first.is_null.sum()) < 8
    drawn = torch.cat([make_batch(dataset, config, step).condition.text.pooled[:, 0] for step in range(20)])
    assert len(drawn[drawn > 0].unique()) > 8


def test_the_rows_of_a_worker_are_those_of_the_batch():
    dataset = make_dataset(make_captions([[1, 2, 3]] * 8))
    config = TrainingConfig(batch_size=8, condition_dropout=0.2)
    whole = make_batch(dataset, config, 5).condition
    part = make_batch(dataset, config, 5, slice(4, 8)).condition
    assert torch.equal(whole.rows(slice(4, 8)).text.sequence, part.text.sequence)


@pytest.mark.parametrize("rows", [1, 5])
def test_a_network_of_the_data_reads_its_batches(rows):
    dataset = make_dataset(make_captions([[2], [], [4, 1]]))
    network = build_network(ResidualMLPConfig(width=16, depth=1), (4,), 0, dataset.null_text)
    batch = make_batch(dataset, TrainingConfig(batch_size=rows), 0)
    assert call_network(network, batch.clean, batch.t, batch.condition).shape == (rows, 4)


def test_data_of_both_train_a_model_of_either():
    dataset = make_dataset(make_captions([[1]] * 400))
    dataset = replace(dataset, class_id=torch.zeros(400, dtype=torch.int64))
    condition = make_batch(dataset, TrainingConfig(batch_size=400, condition_dropout=0.2), 0).condition
    has_class, has_text = condition.class_id >= 0, ~condition.text.is_null
    shares = [(has_class == first) & (has_text == second) for first in (True, False) for second in (True, False)]
    expected = torch.tensor([0.4, 0.2, 0.2, 0.2])
    torch.testing.assert_close(torch.stack(shares).float().mean(1), expected, atol=0.07, rtol=0)


def test_captions_alone_are_dropped_as_asked():
    dataset = make_dataset(make_captions([[1]] * 400))
    condition = make_batch(dataset, TrainingConfig(batch_size=400, condition_dropout=0.2), 0).condition
    assert abs(float(condition.text.is_null.float().mean()) - 0.2) < 0.07
