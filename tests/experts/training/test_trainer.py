import itertools
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from ddm_core.artifacts import Preempted, Workspace
from experts.conditions.condition import Condition
from experts.config import DiTConfig, ResidualMLPConfig, TrainingConfig, UNetConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.networks.model_io import save_model
from experts.networks.registry import build_network, call_network
from experts.training.loss import expert_loss
from experts.training.trainer import DeviceError, TrainingDiverged, check_device, fit, write_rows

NETWORKS = {
    "residual_mlp": (ResidualMLPConfig(width=16, depth=2), (6,)),
    "unet": (UNetConfig(channels=(8, 16)), (1, 8, 8)),
    "dit": (DiTConfig(patch_size=4, heads=2, head_width=8, depth=1), (1, 8, 8)),
}
SHORT = TrainingConfig(steps=15, batch_size=7, warmup_steps=3, log_every=4, checkpoint_every=5)


class Killed(Exception):
    pass


def velocity_loss(model, batch):
    return {"loss": expert_loss(model, batch, "velocity", RECTIFIED_FLOW)}


def killed_at(step):
    """Return a loss that raises `Killed` in the middle of a step."""
    calls = itertools.count()

    def loss(model, batch):
        if next(calls) == step:
            raise Killed
        return velocity_loss(model, batch)

    return loss


def stopping_at(step, folder):
    """Return a workspace that requests a stop before a step."""
    calls = itertools.count()

    class Stopping(Workspace):
        def stop_requested(self):
            return next(calls) == step

    return Stopping.at(folder)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def create_network(kind):
    torch.manual_seed(5)
    return build_network(*NETWORKS[kind], 3)


def train_and_save(kind, make_dataset, workspace, config=SHORT, loss=velocity_loss):
    """Return the bytes of a trained model with its metrics, and the metrics."""
    trained = fit(create_network(kind), loss, make_dataset(shape=NETWORKS[kind][1]), config, workspace)
    save_model(trained.model, workspace.scratch / "saved")
    write_rows(workspace.scratch / "saved" / "metrics.jsonl", trained.rows)
    return content(workspace.scratch / "saved"), trained.rows


@pytest.mark.parametrize("kind", NETWORKS)
def test_resume_after_stop_equals_uninterrupted_training(kind, make_dataset, tmp_path):
    expected = train_and_save(kind, make_dataset, Workspace.at(tmp_path / "whole"))
    for step in (0, 1, 6, 8, 14):
        with pytest.raises(Preempted, match=f"step {step} of 15"):
            train_and_save(kind, make_dataset, stopping_at(step, tmp_path / f"{step}"))
        assert train_and_save(kind, make_dataset, Workspace.at(tmp_path / f"{step}")) == expected


@pytest.mark.parametrize("kind", ["residual_mlp", "dit"])
def test_muon_resumes_bit_for_bit(kind, make_dataset, tmp_path):
    config = replace(SHORT, optimizer="muon", lr_schedule="warmup_stable_decay", early_checkpoint=0.5)
    expected = train_and_save(kind, make_dataset, Workspace.at(tmp_path / "whole"), config)
    assert expected != train_and_save(kind, make_dataset, Workspace.at(tmp_path / "adamw"))
    for step in (1, 8):
        with pytest.raises(Preempted):
            train_and_save(kind, make_dataset, stopping_at(step, tmp_path / f"{step}"), config)
        assert train_and_save(kind, make_dataset, Workspace.at(tmp_path / f"{step}"), config) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_resume_after_kill_equals_uninterrupted_training(kind, make_dataset, tmp_path):
    expected = train_and_save(kind, make_dataset, Workspace.at(tmp_path / "whole"))
    for step in (3, 7, 13):
        with pytest.raises(Killed):
            train_and_save(kind, make_dataset, Workspace.at(tmp_path / f"{step}"), loss=killed_at(step))
        assert train_and_save(kind, make_dataset, Workspace.at(tmp_path / f"{step}")) == expected


def test_stochastic_network_resumes_bit_for_bit(make_dataset, tmp_path):
    def noisy_loss(model, batch):
        return {"loss": velocity_loss(model, batch)["loss"] * torch.rand(())}

    expected = train_and_save("residual_mlp", make_dataset, Workspace.at(tmp_path / "whole"), loss=noisy_loss)
    with pytest.raises(Preempted):
        train_and_save("residual_mlp", make_dataset, stopping_at(9, tmp_path / "other"), loss=noisy_loss)
    torch.manual_seed(77)
    assert train_and_save("residual_mlp", make_dataset, Workspace.at(tmp_path / "other"), loss=noisy_loss) == expected


def test_training_leaves_the_global_generator_unchanged(make_dataset, workspace):
    model = create_network("residual_mlp")
    state = torch.get_rng_state()
    fit(model, velocity_loss, make_dataset(shape=(6,)), SHORT, workspace)
    assert torch.equal(torch.get_rng_state(), state)


def test_loss_falls_on_a_toy_problem(make_dataset, workspace):
    """Two points in the plane: with the class given, the best loss is far below the loss at zero output."""
    dataset = make_dataset(count=200, classes=2)
    dataset.clean[:] = torch.where(dataset.class_id[:, None] == 0, torch.tensor([2.0, 0]), torch.tensor([-2.0, 1]))
    config = TrainingConfig(steps=300, batch_size=64, warmup_steps=20, lr=3e-3, condition_dropout=0)
    torch.manual_seed(0)
    model = build_network(ResidualMLPConfig(width=32, depth=2), (2,), 2)
    trained = fit(model, velocity_loss, dataset, config, workspace)
    assert trained.rows[0]["loss"] > 1.5
    assert trained.rows[-1]["loss"] < 0.2
    t = torch.full((200,), 0.5)
    noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
    noised = RECTIFIED_FLOW.add_noise(dataset.clean, noise, t)
    with torch.no_grad():
        predicted = call_network(trained.model, noised, t, Condition(dataset.class_id))
    assert (predicted - (noise - dataset.clean)).square().mean() < 0.2


def test_metrics_rows_contain_means_and_no_times(make_dataset, workspace):
    trained = fit(create_network("residual_mlp"), velocity_loss, make_dataset(shape=(6,)), SHORT, workspace)
    assert [row["step"] for row in trained.rows] == [4, 8, 12, 15]
    assert all(set(row) == {"step", "lr", "loss", "grad_norm"} for row in trained.rows)
    live = (workspace.attempt / "metrics.jsonl").read_text().splitlines()
    assert all(row.items() <= json.loads(line).items() for row, line in zip(trained.rows, live, strict=True))
    assert json.loads((workspace.attempt / "progress.json").read_text())["figures"]["images_per_s"] > 0


def test_metrics_row_is_the_mean_of_its_steps(make_dataset, tmp_path):
    def rows(log_every, name):
        config = TrainingConfig(steps=6, batch_size=7, warmup_steps=3, log_every=log_every)
        return train_and_save("residual_mlp", make_dataset, Workspace.at(tmp_path / name), config)[1]

    single = [row["loss"] for row in rows(1, "single")]
    expected = [sum(single[:4]) / 4, sum(single[4:]) / 2]
    assert [row["loss"] for row in rows(4, "four")] == pytest.approx(expected)


def test_additional_loss_scalars_are_logged(make_dataset, workspace):
    def loss(model, batch):
        return velocity_loss(model, batch) | {"constant": torch.tensor(2.5)}

    trained = fit(create_network("residual_mlp"), loss, make_dataset(shape=(6,)), SHORT, workspace)
    assert [row["constant"] for row in trained.rows] == [2.5] * 4


def test_nonfinite_loss_stops_the_training(make_dataset, workspace):
    def loss(model, batch):
        return {"loss": velocity_loss(model, batch)["loss"] * float("inf")}

    with pytest.raises(TrainingDiverged, match=r"step 4 .*lower training\.lr"):
        fit(create_network("residual_mlp"), loss, make_dataset(shape=(6,)), SHORT, workspace)
    assert not list((workspace.scratch).glob("checkpoints/*"))


def test_diverged_training_is_not_saved(make_dataset, workspace):
    config = TrainingConfig(steps=15, batch_size=7, log_every=10, checkpoint_every=2)

    def loss(model, batch):
        return {"loss": velocity_loss(model, batch)["loss"] * float("nan")}

    with pytest.raises(TrainingDiverged, match="step 2 "):
        fit(create_network("residual_mlp"), loss, make_dataset(shape=(6,)), config, workspace)
    assert not list((workspace.scratch).glob("checkpoints/*"))


@pytest.mark.parametrize("name", ["cuda:77", "toaster"])
def test_unavailable_device_is_refused(name):
    with pytest.raises(DeviceError, match=r"training\.device=cpu"):
        check_device(name)


def test_gradients_are_clipped(make_dataset, workspace):
    model = create_network("residual_mlp")
    config = TrainingConfig(steps=3, batch_size=7, clip_norm=1e-3)
    trained = fit(model, velocity_loss, make_dataset(shape=(6,)), config, workspace)
    clipped_norm = nn.utils.get_total_norm(parameter.grad for parameter in model.parameters())
    assert clipped_norm.item() == pytest.approx(1e-3, rel=1e-3)
    assert trained.rows[0]["grad_norm"] > 0.01, "the norm before clipping is what is logged"


@pytest.mark.parametrize("kind", ["residual_mlp", "dit"])
@pytest.mark.parametrize("parts", [2, 3, 100])
def test_accumulated_gradients_are_those_of_the_whole_batch(kind, parts, make_dataset, tmp_path):
    whole, divided = (
        gradients_of_first_step(kind, make_dataset, accumulate, tmp_path / f"{accumulate}") for accumulate in (1, parts)
    )
    assert divided[1] == pytest.approx(whole[1], rel=1e-5), "metrics are means over the rows of all parts"
    largest = max(gradient.abs().max() for gradient in whole[0].values())
    for name, gradient in whole[0].items():
        assert (divided[0][name] - gradient).abs().max() <= 1e-5 * largest, name


def gradients_of_first_step(kind, make_dataset, accumulate, folder):
    """Return the gradients of the first step, by parameter, and its metrics."""
    model = create_network(kind)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    config = replace(SHORT, steps=1, accumulate=accumulate, clip_norm=1e9)
    trained = fit(model, velocity_loss, make_dataset(shape=NETWORKS[kind][1]), config, Workspace.at(folder))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return gradients, trained.rows[0]


def test_training_in_parts_resumes_bit_for_bit(make_dataset, tmp_path):
    def noisy_loss(model, batch):
        return {"loss": velocity_loss(model, batch)["loss"] * torch.rand(())}

    config = replace(SHORT, accumulate=3)
    expected = train_and_save("residual_mlp", make_dataset, Workspace.at(tmp_path / "whole"), config, noisy_loss)
    with pytest.raises(Preempted):
        train_and_save("residual_mlp", make_dataset, stopping_at(8, tmp_path / "other"), config, noisy_loss)
    again = train_and_save("residual_mlp", make_dataset, Workspace.at(tmp_path / "other"), config, noisy_loss)
    assert again == expected


@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
def test_lower_precision_trains_and_resumes(autocast, make_dataset, tmp_path):
    config = TrainingConfig(steps=12, batch_size=7, warmup_steps=3, log_every=4, checkpoint_every=5, autocast=autocast)
    expected = train_and_save("residual_mlp", make_dataset, Workspace.at(tmp_path / "whole"), config)
    with pytest.raises(Preempted):
        train_and_save("residual_mlp", make_dataset, stopping_at(7, tmp_path / "other"), config)
    assert train_and_save("residual_mlp", make_dataset, Workspace.at(tmp_path / "other"), config) == expected
    full = train_and_save("residual_mlp", make_dataset, Workspace.at(tmp_path / "full"))
    assert expected[1][-1]["loss"] == pytest.approx(full[1][2]["loss"], rel=0.05)


def test_fit_returns_the_averaged_parameters(make_dataset, workspace):
    model = create_network("residual_mlp")
    trained = fit(model, velocity_loss, make_dataset(shape=(6,)), SHORT, workspace)
    assert isinstance(trained.model, nn.Module)
    assert not trained.model.training
    assert any(
        not torch.equal(ours, last) for ours, last in zip(trained.model.parameters(), model.parameters(), strict=True)
    )
