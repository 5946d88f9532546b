"""The distilled monolith."""

from dataclasses import replace

import pytest
import torch

from ddm_core.artifacts import Workspace, read_json
from experts.architectures.residual_mlp import ResidualMLP
from experts.baselines.distilled_monolith import student_loss, train_distilled_monolith
from experts.codecs.registry import fit_codec
from experts.conditions.condition import Condition
from experts.config import CodecConfig, ExpertConfig, ResidualMLPConfig, TrainingConfig
from experts.diffusion.noise_schedule import COSINE, RECTIFIED_FLOW
from experts.expert import Expert, network_flops, train_expert
from experts.networks.class_settings import NetworkError
from experts.training.latent_dataset import Batch
from experts.training.loss import expert_loss

TRAINING = TrainingConfig(steps=120, batch_size=32, warmup_steps=5, log_every=20, lr=4e-3)
CONFIG = ExpertConfig(network=ResidualMLPConfig(width=24, depth=1), training=TRAINING)


def teacher(seed, noise_schedule=RECTIFIED_FLOW, prediction="velocity"):
    torch.manual_seed(seed)
    model = ResidualMLP(latent_shape=[4], width=16, depth=1).eval()
    torch.nn.init.normal_(model.exit.weight)
    metadata = {"latent_shape": (4,), "num_classes": 0, "cluster_id": 0}
    return Expert(model=model, prediction=prediction, noise_schedule=noise_schedule, **metadata)


def batch(rows=6):
    draws = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, rows, 4, generator=draws)
    t, clusters = torch.linspace(0.1, 0.8, rows), torch.arange(rows) % 2
    return Batch(clean=clean, noise=noise, t=t, condition=Condition.null(rows), cluster_id=clusters)


def test_student_equal_to_its_teacher_has_zero_loss():
    only = teacher(0)
    assert student_loss(only.model, batch(), {0: only, 1: only}, "velocity", RECTIFIED_FLOW).item() < 1e-10


def test_each_sample_learns_from_its_cluster_expert():
    experts, samples = {0: teacher(0), 1: teacher(1)}, batch()
    losses = torch.zeros(2)
    for k, expert in experts.items():
        rows = samples.cluster_id == k
        noised = RECTIFIED_FLOW.add_noise(samples.clean, samples.noise, samples.t)[rows]
        velocities = [member.velocity(noised, samples.t[rows], Condition.null(3)) for member in (expert, experts[0])]
        losses[k] = (velocities[0] - velocities[1]).square().mean()
    assert losses[0] == 0 < losses[1]
    torch.testing.assert_close(
        student_loss(experts[0].model, samples, experts, "velocity", RECTIFIED_FLOW), losses.mean()
    )


def test_cluster_without_teacher_uses_the_expert_loss():
    student = teacher(5).model
    alone = student_loss(student, batch(), {}, "noise", COSINE)
    torch.testing.assert_close(alone, expert_loss(student, batch(), "noise", COSINE))


def test_teacher_of_another_prediction_is_converted():
    """Check zero loss of a student with another prediction that agrees with its teacher."""
    velocity = teacher(3)

    class CleanFromVelocity(ResidualMLP):
        def forward(self, noised, t, class_index, pooled_text=None):
            teacher_velocity = velocity.velocity(noised, t, Condition.null(len(t)))
            return (noised - teacher_velocity * t[:, None]).detach()

    from experts.networks import registry as networks

    networks.CALLS["CleanFromVelocity"] = networks.CALLS["ResidualMLP"]
    try:
        clean = student_loss(
            CleanFromVelocity(latent_shape=[4]), batch(), {0: velocity, 1: velocity}, "clean", RECTIFIED_FLOW
        )
    finally:
        del networks.CALLS["CleanFromVelocity"]
    assert clean.item() < 1e-10


@pytest.fixture
def expert_folder(shards, tmp_path, workspace):
    fit_codec(CodecConfig(components=4), shards, tmp_path / "codec", workspace)
    train_expert(CONFIG, [shards], tmp_path / "codec", tmp_path / "expert", workspace)
    return tmp_path / "expert"


def test_student_of_one_expert_matches_that_expert(expert_folder, shards, tmp_path):
    work = Workspace.at(tmp_path / "student_work")
    summary = train_distilled_monolith(
        CONFIG, {0: expert_folder}, [shards], tmp_path / "codec", tmp_path / "distilled_monolith", work
    )
    student, expert = Expert.load(tmp_path / "distilled_monolith"), Expert.load(expert_folder)
    noised, t = torch.randn(200, 4), torch.rand(200)
    velocities = [member.velocity(noised, t, Condition.null(200)) for member in (student, expert)]
    assert (velocities[0] - velocities[1]).square().mean() < 0.15 * velocities[1].square().mean()
    forward, rows = network_flops(expert.model, (4,)), TRAINING.steps * TRAINING.batch_size
    assert (summary.student, summary.teachers, summary.experts) == (
        3 * forward * rows,
        forward * rows,
        3 * forward * rows,
    )
    assert summary.flops == 4 * forward * rows
    assert read_json(tmp_path / "distilled_monolith" / "distilled_monolith.json")["experts"] == summary.experts


def test_student_can_start_from_an_expert(expert_folder, shards, tmp_path):
    short = replace(CONFIG, init=str(expert_folder), training=replace(TRAINING, steps=1, warmup_steps=50))
    work = Workspace.at(tmp_path / "student_work")
    train_distilled_monolith(
        short, {0: expert_folder}, [shards], tmp_path / "codec", tmp_path / "distilled_monolith", work
    )
    student, expert = Expert.load(tmp_path / "distilled_monolith"), Expert.load(expert_folder)
    pairs = zip(student.model.parameters(), expert.model.parameters(), strict=True)
    assert all((a - b).abs().max() < 1e-3 for a, b in pairs)


def test_student_can_start_from_the_mean_of_experts(shards, tmp_path, workspace):
    fit_codec(CodecConfig(components=4), shards, tmp_path / "codec", workspace)
    folders = {k: tmp_path / f"expert_{k}" for k in range(2)}
    for k, folder in folders.items():
        config = replace(CONFIG, training=replace(TRAINING, seed=k, steps=20))
        train_expert(config, [shards], tmp_path / "codec", folder, Workspace.at(tmp_path / f"work_{k}"))
    short = replace(CONFIG, training=replace(TRAINING, steps=1, warmup_steps=50, lr=1e-6))

    def distill(name, teachers, config=short):
        place, work = tmp_path / name, Workspace.at(tmp_path / f"{name}_work")
        train_distilled_monolith(config, teachers, [shards] * 2, tmp_path / "codec", place, work, from_mean=True)
        return Expert.load(place).model.state_dict()

    student, (first, second) = distill("student", folders), (Expert.load(folder) for folder in folders.values())
    for name, value in first.model.state_dict().items():
        torch.testing.assert_close(student[name], (value + second.model.state_dict()[name]) / 2, atol=1e-5, rtol=0)
    wide = replace(short, network=ResidualMLPConfig(width=16, depth=1))
    with pytest.raises(NetworkError, match=r"from_mean needs experts with the student's network, and theirs differ"):
        distill("wide", folders, wide)
    with pytest.raises(NetworkError, match=r"from_mean needs experts of the student's prediction noise"):
        distill("noise", folders, replace(short, prediction="noise"))
