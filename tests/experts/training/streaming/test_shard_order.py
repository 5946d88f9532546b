"""The order of streamed samples: every sample once an epoch, blocks of tars together, and no state."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.training.streaming.shard_order import ShardOrder

COUNTS = st.lists(st.integers(1, 9), min_size=1, max_size=12).map(tuple)


@given(COUNTS, st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31))
def test_every_sample_occurs_once_an_epoch(counts, block_tars, batch_size, seed):
    order = ShardOrder(counts, block_tars, seed)
    steps = 3 * order.count // batch_size + 1
    rows = torch.cat([order.rows(batch_size, step) for step in range(steps)]).tolist()
    epochs = [rows[start : start + order.count] for start in range(0, len(rows) - order.count + 1, order.count)]
    assert all(sorted(epoch) == list(range(order.count)) for epoch in epochs)
    assert epochs == [
        ShardOrder(counts, block_tars, seed).rows(order.count, epoch).tolist() for epoch in range(len(epochs))
    ]


@given(COUNTS, st.integers(1, 5), st.integers(0, 200))
def test_samples_come_from_the_tars_of_their_block(counts, block_tars, position):
    order = ShardOrder(counts, block_tars, 3)
    ends = list(itertools.accumulate(counts))
    row = int(order.rows(1, position))
    tar = next(tar for tar, end in enumerate(ends) if row < end)
    blocks = list(itertools.islice(order.tars_from(position), 2))
    assert tar in blocks[0]
    assert all(1 <= len(block) <= block_tars for block in blocks)
    left = sum(counts[tar] for tar in blocks[0]) - order.find(position)[2]
    assert order.find(position + left)[2] == 0
    assert next(order.tars_from(position + left)) == blocks[1]


def test_tars_and_samples_are_in_another_order_every_epoch():
    order = ShardOrder((20,) * 10, 2, 0)
    epochs = [order.rows(200, epoch).tolist() for epoch in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len({next(order.tars_from(200 * epoch)) for epoch in range(3)}) > 1
    assert epochs[0] != ShardOrder((20,) * 10, 2, 1).rows(200, 0).tolist()
    assert epochs[0][:40] != sorted(epochs[0][:40])
