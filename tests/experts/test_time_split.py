"""Training on intervals of t: which t, which rows of metrics, and what is written."""

import json
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ddm_core.artifacts import read_json
from experts.codecs.registry import fit_codec
from experts.conditions.condition import Condition
from experts.config import CodecConfig, ExpertConfig, ResidualMLPConfig, TrainingConfig
from experts.diffusion.intervals import WHOLE, restrict_times, share_of
from experts.diffusion.noise_schedule import shift_times
from experts.expert import Expert, train_expert
from experts.networks.class_settings import NetworkError
from experts.time_split import TimeSplitExpert, join_rows, train_intervals


@given(
    low=st.floats(0, 0.8),
    width=st.floats(0.125, 0.2),
    mean=st.floats(-1, 1),
    std=st.floats(0.5, 2),
    shift=st.floats(0.3, 3),
)
def test_restricted_times_have_the_density_of_the_interval(low, width, mean, std, shift):
    training, interval = TrainingConfig(t_mean=mean, t_std=std, t_shift=shift), (low, low + width)
    normal = torch.special.ndtri((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    t = shift_times((mean + std * normal).sigmoid(), shift)
    inside = t[(t >= interval[0]) & (t < interval[1])]
    restricted = restrict_times(t, interval, training)
    assert share_of(interval, training) == pytest.approx(len(inside) / 4000, abs=1e-3)
    assert interval[0] <= restricted.min() and restricted.max() <= interval[1] and (restricted.diff() >= 0).all()
    if len(inside) > 200:
        points = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
        torch.testing.assert_close(restricted.quantile(points), inside.quantile(points), atol=3e-3, rtol=0)
    torch.testing.assert_close(restrict_times(t, WHOLE, training), t)


def test_rows_join_by_shares_and_by_measured_times():
    low = [{"step": 2, "lr": 1.0, "loss": 1.0, "held_out": 3.0, "held_out_0.1": 3.0}]
    high = [
        {"step": 2, "lr": 1.0, "loss": 5.0, "held_out": 6.0, "held_out_0.6": 5.0, "held_out_0.9": 7.0},
        {"step": 4, "lr": 0.5, "loss": 4.0, "held_out": 4.5, "held_out_0.6": 4.0, "held_out_0.9": 5.0},
    ]
    first, second = join_rows([low, high], [0.25, 0.75])
    assert (first["loss"], first["held_out"], first["held_out_0.9"]) == (4.0, 5.0, 7.0)
    assert (second["step"], second["loss"], second["held_out"]) == (4, 3.25, 4.0)


@pytest.mark.parametrize("bounds", [(0.1,), (0.5, 0.5), (0.9,), (0.5, 0.3), (1.2,)])
def test_short_intervals_are_refused(bounds):
    with pytest.raises(ValidationError, match=r"steps of at least 0\.125"):
        ExpertConfig(time_bounds=bounds)


def test_an_expert_of_two_intervals_is_trained_as_two_networks(shards, tmp_path, workspace):
    codec = tmp_path / "codec"
    fit_codec(CodecConfig(components=8), shards, codec, workspace)
    training = TrainingConfig(steps=8, batch_size=20, warmup_steps=2, log_every=4, held_out_every=4)
    config = ExpertConfig(network=ResidualMLPConfig(width=16, depth=1), time_bounds=(0.25,), training=training)
    train = partial(train_expert, shards=[shards], codec=codec, held_out=[shards])
    summary = train_intervals(config, tmp_path / "out", workspace, train)
    plain = train_intervals(
        ExpertConfig(network=config.network, training=training), tmp_path / "plain", workspace.part("plain"), train
    )
    assert (summary.flops, summary.epochs, summary.parameters) == (plain.flops, plain.epochs, 2 * plain.parameters)
    expert, parts = TimeSplitExpert.load(tmp_path / "out"), [Expert.load(tmp_path / "out" / name) for name in "01"]
    inputs = torch.randn(2, 8), torch.tensor([0.2, 0.3]), Condition.null(2)
    velocities = [part.velocity(*inputs)[[row]] for row, part in enumerate(parts)]
    torch.testing.assert_close(expert.velocity(*inputs, parts[0].noise_schedule), torch.cat(velocities))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8]
    measured = [value for key, value in rows[-1].items() if key.startswith("held_out_")]
    assert len(measured) == 8 and rows[-1]["held_out"] == pytest.approx(sum(measured) / 8)
    assert summary.final_loss == pytest.approx(rows[-1]["loss"])
    assert read_json(tmp_path / "out" / "0" / "training.json")["epochs"] == plain.epochs / 2
    with pytest.raises(NetworkError, match="trains one network"):
        train(config=config, out=tmp_path / "wrong", workspace=workspace)
