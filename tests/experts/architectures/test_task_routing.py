"""Task routing: the windows, and what keeps them: a folder, a copy, a training."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.architectures.task_routing import TaskRouting
from experts.codecs.registry import fit_codec
from experts.conditions.condition import Condition
from experts.config import CodecConfig, ExpertConfig, ResidualMLPConfig, TrainingConfig
from experts.expert import Expert, train_expert


@given(
    share=st.floats(0.01, 1),
    power=st.floats(0.2, 8),
    channels=st.integers(1, 70),
    t=st.lists(st.floats(0, 1), min_size=1),
)
def test_windows_have_one_width_and_rise_with_t(share, power, channels, t):
    routing = TaskRouting(share, power)
    routing.t = torch.tensor([0.0, *sorted(t), 1.0])
    active = routing.window(torch.zeros(len(routing.t), 3, channels))[:, 0]
    assert active.sum(1).unique().tolist() == [max(1, math.floor(share * channels))]
    first = active.int().argmax(1)
    assert first[0] == 0 and active[-1, -1] and (first.diff() >= 0).all()
    assert all(row[start : start + width].all() for row, start, width in zip(active, first, active.sum(1), strict=True))


def test_t_of_other_rows_is_an_error():
    routing = TaskRouting(0.5, 4.0)
    routing.t = torch.zeros(2)
    with pytest.raises(RuntimeError, match="needs the t of its 3 rows"):
        routing.window(torch.zeros(3, 8))


def test_trained_expert_keeps_its_windows(shards, tmp_path, workspace):
    fit_codec(CodecConfig(components=8), shards, tmp_path / "codec", workspace)
    training = TrainingConfig(steps=8, batch_size=20, warmup_steps=2, log_every=4)
    network, experts, sizes = ResidualMLPConfig(width=16, depth=2), [], set()
    for share in (1.0, 0.5):
        config, out = ExpertConfig(network=network, task_share=share, training=training), tmp_path / f"{share}"
        summary = train_expert(config, [shards], tmp_path / "codec", out, workspace.part(f"{share}"))
        experts.append(Expert.load(out))
        sizes.add((summary.parameters, summary.flops))
    assert len(sizes) == 1
    plain, routed = (expert.model for expert in experts)
    assert routed.task_routing.settings() == {
        "share": 0.5,
        "power": 4.0,
        "blocks": ["blocks.0", "blocks.1"],
        "output": -1,
    }
    assert not torch.equal(plain.blocks[0].inner.weight, routed.blocks[0].inner.weight)
    inputs = torch.randn(4, 8), torch.tensor([0.1, 0.4, 0.7, 1.0]), Condition.null(4)
    plain.load_state_dict(routed.state_dict())
    assert not torch.allclose(experts[0].velocity(*inputs), experts[1].velocity(*inputs))
