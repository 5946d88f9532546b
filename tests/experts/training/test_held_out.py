import json
from dataclasses import replace

import pytest
import torch

from ddm_core.artifacts import Preempted, Workspace, read_json
from experts.codecs.registry import fit_codec, load_codec
from experts.config import CodecConfig, ExpertConfig, ResidualMLPConfig, TrainingConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert, train_expert
from experts.training.held_out import TIMES, count_held_out, measure_held_out, stopped_gaining, take_evenly
from experts.training.latents.training_set import encode_latents
from experts.training.optimizers.ema import rebuild_average

SHORT = TrainingConfig(steps=15, batch_size=8, warmup_steps=3, log_every=4, checkpoint_every=5, held_out_every=5)
EXPERT = ExpertConfig(network=ResidualMLPConfig(width=16, depth=1), training=SHORT)
CPU = torch.device("cpu")


def velocity_off_by_t(dataset):
    """Return a velocity that differs from the true one by t; it knows every sample by its class."""

    def velocity(noised, t, condition):
        clean = dataset.clean[condition.class_id]
        t = t[:, None]
        return (noised - (1 - t) * clean) / t - clean + t

    return velocity


@pytest.mark.parametrize("block_rows", [3, 1000])
def test_error_is_that_of_the_velocity_at_eight_t(block_rows, make_dataset):
    dataset = make_dataset(count=10, classes=10)
    measured = measure_held_out(velocity_off_by_t(dataset), dataset, RECTIFIED_FLOW, block_rows, CPU)
    assert measured["held_out"] == pytest.approx(sum(t**2 for t in TIMES) / 8, rel=1e-4)
    assert [measured[f"held_out_{t:.4f}"] for t in TIMES] == pytest.approx([t**2 for t in TIMES], rel=1e-3)


def test_noise_belongs_to_the_sample_and_not_to_its_place(make_dataset):
    dataset = replace(make_dataset(count=12), sample_id=torch.arange(12) * 2**40 - 7)
    first, second = (
        measure_held_out(lambda noised, t, condition: noised.square(), samples, RECTIFIED_FLOW, 5, CPU)["held_out"]
        for samples in (dataset, dataset.select(torch.randperm(12)))
    )
    assert first == pytest.approx(second, rel=1e-5)


def test_measurements_cost_a_hundredth_of_the_steps():
    config = TrainingConfig(batch_size=64, held_out_every=250)
    rows = len(TIMES) * count_held_out(config)
    assert 0.008 < rows / (3 * 64 * 250) <= 0.01


def train(shards, folder, config=EXPERT, held_out=True, stop_before=None):
    """Train an expert, in two attempts if it is stopped, and return its rows and the bytes of its parameters."""
    codec = folder.parent / "codec"
    if not codec.exists():
        fit_codec(CodecConfig(components=4), shards, codec, Workspace.at(folder / "codec_work"))
    workspace = Workspace.at(folder / "work")
    if stop_before is not None:
        calls = iter(range(100))
        stopping = replace(workspace, stopping=lambda: next(calls) == stop_before)
        with pytest.raises(Preempted):
            train_expert(config, [shards], codec, folder / "out", stopping, held_out=[shards] * held_out)
    (folder / "out").mkdir(exist_ok=True)
    train_expert(config, [shards], codec, folder / "out", workspace, held_out=[shards] * held_out)
    rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return rows, (folder / "out" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_measuring_averaged_parameters_changes_no_training(shards, tmp_path):
    rows, parameters = train(shards, tmp_path / "whole")
    assert [row["step"] for row in rows if "held_out" in row] == [8, 12, 15]
    assert (
        read_json(Workspace.at(tmp_path / "whole" / "work").attempt / "progress.json")["figures"]["held_out"]
        == rows[-1]["held_out"]
    )
    without, same = train(shards, tmp_path / "without", held_out=False)
    assert same == parameters and not any("held_out" in row for row in without)
    assert train(shards, tmp_path / "resumed", stop_before=9) == (rows, parameters)
    expert = Expert.load(tmp_path / "whole" / "out")
    codec = tmp_path / "codec"
    latents = encode_latents([shards], load_codec(codec), codec, Workspace.at(tmp_path / "again"))
    samples = take_evenly(latents, count_held_out(SHORT))
    measured = measure_held_out(expert.velocity, samples, RECTIFIED_FLOW, 100, CPU)
    assert measured["held_out"] == pytest.approx(rows[-1]["held_out"], rel=1e-5)


def test_training_without_gain_ends_early(shards, tmp_path):
    training = replace(SHORT, steps=400, lr=1e-9, held_out_every=4, stop_after_no_gain=2, checkpoint_every=400)
    rows, _ = train(shards, tmp_path / "early", replace(EXPERT, training=training))
    losses = [row["held_out"] for row in rows]
    assert len(rows) < 100 and min(losses[-2:]) >= min(losses[:-2])
    assert read_json(tmp_path / "early" / "out" / "training.json")["steps"] == rows[-1]["step"] == 4 * len(rows)


def test_gain_is_a_new_lowest_error():
    def rows(*losses):
        return [{"step": 1}, *({"step": 1, "held_out": loss} for loss in losses)]

    assert not stopped_gaining(rows(1.0, 2.0), 2)
    assert stopped_gaining(rows(1.0, 2.0, 1.0), 2)
    assert not stopped_gaining(rows(1.0, 2.0, 0.9), 2)


def test_early_end_needs_measurements():
    with pytest.raises(ValueError, match=r"training\.held_out_every"):
        TrainingConfig(held_out_every=None, stop_after_no_gain=3)


def test_snapshots_of_averages_survive_a_stop(shards, tmp_path):
    config = replace(EXPERT, training=replace(SHORT, ema_snapshots=5, held_out_every=None))

    def snapshots(name):
        return {path.name: path.read_bytes() for path in (tmp_path / name / "out" / "ema").iterdir()}

    train(shards, tmp_path / "whole", config)
    train(shards, tmp_path / "stopped", config, stop_before=8)
    assert snapshots("whole") == snapshots("stopped") and len(snapshots("whole")) == 10
    rebuilt = rebuild_average(tmp_path / "whole" / "out" / "ema", SHORT.ema_width)
    parameters = dict(Expert.load(tmp_path / "whole" / "out").model.named_parameters())
    assert all(torch.allclose(rebuilt[name], value, atol=1e-5) for name, value in parameters.items())
