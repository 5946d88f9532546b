"""A training that diverges goes back once, and a step of training never waits for the device."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.arms.trainer.steps import CountWaits
from ddm_core.artifacts import Preempted, Workspace
from experts.training import latent_dataset
from experts.training.latent_dataset import draw_noise, make_batch
from experts.training.streaming.batches import BatchesAhead
from experts.training.trainer import TrainingDiverged, Watch, fit
from tests.experts.training.test_trainer import NETWORKS, SHORT, create_network, stopping_at, velocity_loss

CONFIG = replace(SHORT, log_every=1, checkpoint_every=3)
WATCH = Watch(stops_spikes=True, sample_flops=10.0)


def poisoned(dataset, *steps, by):
    """Return a loss that is multiplied in these steps of the first order of the samples."""
    marks = [make_batch(dataset, CONFIG, step).noise[0, 0] for step in steps]

    def loss(model, batch):
        is_bad = any(batch.noise[0, 0] == mark for mark in marks)
        return {"loss": velocity_loss(model, batch)["loss"] * (by if is_bad else 1.0)}

    return loss


def train(dataset, workspace, loss, config=CONFIG):
    trained = fit(create_network("residual_mlp"), loss, dataset, config, workspace, watch=WATCH)
    return trained.rows, [parameter.tolist() for parameter in trained.model.parameters()]


@pytest.mark.parametrize("by", [float("nan"), 1000.0])
def test_diverged_training_goes_back_once(by, make_dataset, tmp_path):
    dataset = make_dataset(shape=(6,))
    loss, workspace = poisoned(dataset, 7, by=by), Workspace.at(tmp_path / "whole")
    expected = train(dataset, workspace, loss)
    assert "at step 8 " in workspace.notices[0] and "goes back to step 6" in workspace.notices[0]
    plain, _ = train(dataset, Workspace.at(tmp_path / "plain"), velocity_loss)
    rows = expected[0]
    assert rows[:6] == plain[:6] and rows[6] != plain[6], "the order is another one from the checkpoint on"
    assert [row["step"] for row in rows] == list(range(1, 16))
    live = [json.loads(line) for line in (workspace.attempt / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in live] == list(range(1, 16))
    for calls in (9, 12):  # before and after the first checkpoint in the other order
        with pytest.raises(Preempted):
            train(dataset, stopping_at(calls, tmp_path / f"{calls}"), loss)
        assert train(dataset, Workspace.at(tmp_path / f"{calls}"), loss) == expected


def test_training_that_diverges_twice_stops(make_dataset, workspace):
    dataset = make_dataset(shape=(6,))
    dataset.clean[dataset.batch_indices(CONFIG, 5)[0][0]] = torch.nan
    with pytest.raises(TrainingDiverged, match=r"is nan at step \d+ .* has gone back once.* lower training\.lr"):
        train(dataset, workspace, velocity_loss, replace(CONFIG, checkpoint_every=1))


def test_spikes_are_left_alone_without_a_factor(make_dataset, workspace):
    dataset = make_dataset(shape=(6,))
    rows, _ = train(dataset, workspace, poisoned(dataset, 7, by=1000.0), replace(CONFIG, spike_factor=None))
    assert rows[7]["loss"] > 100 and not workspace.notices


@pytest.mark.parametrize("kind", ["residual_mlp", "dit"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_between_two_rows_wait_for_nothing(kind, accumulate, make_dataset, tmp_path):
    def waits(steps):
        dataset = make_dataset(shape=NETWORKS[kind][1])
        config = replace(SHORT, steps=steps, log_every=100, checkpoint_every=100, accumulate=accumulate)
        with CountWaits() as counted:
            fit(create_network(kind), velocity_loss, dataset, config, Workspace.at(tmp_path / f"{steps}"), watch=WATCH)
        return counted.count

    assert waits(2) == waits(9) > 0


def test_live_rows_have_the_speed_and_saved_rows_do_not(make_dataset, workspace):
    rows, _ = train(make_dataset(shape=(6,)), workspace, velocity_loss)
    live = [json.loads(line) for line in (workspace.attempt / "metrics.jsonl").read_text().splitlines()]
    speed = {"samples_per_s", "data_stall", "peak_memory_gb", "flops_per_s"}
    assert all(set(shown) == set(row) | speed for shown, row in zip(live, rows, strict=True))
    assert all(0 <= shown["data_stall"] < 1 for shown in live)
    assert live[3]["flops_per_s"] == pytest.approx(10 * live[3]["samples_per_s"])


@pytest.mark.parametrize("shape", [(1,), (4, 4, 4), (4, 32, 32)])
def test_rows_of_a_worker_have_the_noise_of_the_whole_batch(shape, monkeypatch):
    monkeypatch.setattr(latent_dataset, "NOISE_BLOCK", 2**11)
    whole = draw_noise(100, shape, slice(None), 3, 7)
    for rows in (slice(0, 16), slice(16, 40), slice(40, 41), slice(41, 100)):
        assert torch.equal(draw_noise(100, shape, rows, 3, 7), whole[rows])
    numbers = whole.flatten(1).double()
    assert len(torch.unique(numbers[:, 0])) == 100
    assert abs(numbers.mean()) < 5 / numbers.numel() ** 0.5
    others = [draw_noise(100, shape, slice(None), *key) for key in ((3, 8), (4, 7))]
    assert all((other != whole).all() for other in others)


def test_worker_draws_no_blocks_of_others(monkeypatch):
    drawn = []
    monkeypatch.setattr(latent_dataset, "derive_seed", lambda *key: drawn.append(key[2] & (2**32 - 1)) or 0)
    draw_noise(256, (4, 32, 32), slice(64, 128), 0, 5)
    assert drawn == [4, 5, 6, 7]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_batches_ahead_are_those_of_their_steps(device, make_dataset):
    dataset = make_dataset()
    with BatchesAhead(6, torch.device(device)) as batches:
        for step in (0, 1, 2, 1, 2, 5):
            if step == 1:
                batches.clear()
            batch, expected = (
                batches.take(step, lambda step: make_batch(dataset, CONFIG, step)),
                make_batch(dataset, CONFIG, step),
            )
            assert torch.equal(batch.noise, expected.noise) and torch.equal(batch.clean, expected.clean)
        batches.clear()
        with pytest.raises(ZeroDivisionError):
            batches.take(4, lambda step: 1 // 0)
