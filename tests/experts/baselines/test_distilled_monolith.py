"""One network that learns from the experts."""

from dataclasses import replace

import pytest
import torch

from ddm_core.artifacts import Workspace, read_json
from experts.architectures.residual_mlp import ResidualMLP
from experts.baselines.distilled_monolith import student_loss, train_distilled_monolith
from experts.codecs.registry import fit_codec
from experts.condition import Condition
from experts.config import CodecConfig, ExpertConfig, ResidualMLPConfig, TrainingConfig
from experts.diffusion.noise_schedule import COSINE, RECTIFIED_FLOW
from experts.expert import Expert, network_flops, train_expert
from experts.training.latent_dataset import Batch
from experts.training.loss import expert_loss

TRAINING = TrainingConfig(steps=120, batch_size=32, warmup_steps=5, log_every=20, lr=4e-3)
CONFIG = ExpertConfig(network=ResidualMLPConfig(width=24, depth=1), training=TRAINING)


def teacher(seed, path=RECTIFIED_FLOW, prediction="velocity"):
    torch.manual_seed(seed)
    model = ResidualMLP(latent_shape=[4], width=16, depth=1).eval()
    torch.nn.init.normal_(model.exit.weight)
    described = {"latent_shape": (4,), "num_classes": 0, "cluster_id": 0}
    return Expert(model=model, prediction=prediction, noise_schedule=path, **described)


def batch(rows=6):
    draws = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, rows, 4, generator=draws)
    t, clusters = torch.linspace(0.1, 0.8, rows), torch.arange(rows) % 2
    return Batch(clean=clean, noise=noise, t=t, condition=Condition.null(rows), cluster_id=clusters)


def test_a_student_that_is_its_teacher_loses_nothing():
    only = teacher(0)
    assert student_loss(only.model, batch(), {0: only, 1: only}, "velocity", RECTIFIED_FLOW).item() < 1e-10


def test_every_sample_is_taught_by_the_expert_of_its_own_cluster():
    experts, given = {0: teacher(0), 1: teacher(1)}, batch()
    losses = torch.zeros(2)
    for k, expert in experts.items():
        rows = given.cluster_id == k
        noised = RECTIFIED_FLOW.add_noise(given.clean, given.noise, given.t)[rows]
        said = [one.velocity(noised, given.t[rows], Condition.null(3)) for one in (expert, experts[0])]
        losses[k] = (said[0] - said[1]).square().mean()
    assert losses[0] == 0 < losses[1]
    torch.testing.assert_close(
        student_loss(experts[0].model, given, experts, "velocity", RECTIFIED_FLOW), losses.mean()
    )


def test_without_a_teacher_a_cluster_is_learnt_from_its_samples():
    student = teacher(5).model
    alone = student_loss(student, batch(), {}, "noise", COSINE)
    torch.testing.assert_close(alone, expert_loss(student, batch(), "noise", COSINE))


def test_teachers_of_another_kind_are_matched():
    """A teacher says the same on every path, so a student of another prediction that agrees loses nothing."""
    velocity = teacher(3)

    class Same(ResidualMLP):
        def forward(self, noised, t, class_index):
            said = velocity.velocity(noised, t, Condition.null(len(t)))
            return (noised - said * t[:, None]).detach()

    from experts.networks import registry as networks

    networks._CALLS[Same] = networks._call_residual_mlp
    try:
        clean = student_loss(Same(latent_shape=[4]), batch(), {0: velocity, 1: velocity}, "clean", RECTIFIED_FLOW)
    finally:
        del networks._CALLS[Same]
    assert clean.item() < 1e-10


@pytest.fixture
def taught(shards, tmp_path, workspace):
    fit_codec(CodecConfig(components=4), shards, tmp_path / "codec", workspace)
    train_expert(CONFIG, [shards], tmp_path / "codec", tmp_path / "expert", workspace)
    return tmp_path / "expert"


def test_a_student_of_one_expert_becomes_that_expert(taught, shards, tmp_path):
    work = Workspace.at(tmp_path / "student_work")
    summary = train_distilled_monolith(
        CONFIG, {0: taught}, [shards], tmp_path / "codec", tmp_path / "distilled_monolith", work
    )
    student, expert = Expert.load(tmp_path / "distilled_monolith"), Expert.load(taught)
    noised, t = torch.randn(200, 4), torch.rand(200)
    said = [one.velocity(noised, t, Condition.null(200)) for one in (student, expert)]
    assert (said[0] - said[1]).square().mean() < 0.15 * said[1].square().mean()
    forward, rows = network_flops(expert.model, (4,)), TRAINING.steps * TRAINING.batch_size
    assert (summary.student, summary.teachers, summary.experts) == (
        3 * forward * rows,
        forward * rows,
        3 * forward * rows,
    )
    assert summary.flops == 4 * forward * rows
    assert read_json(tmp_path / "distilled_monolith" / "distilled_monolith.json")["experts"] == summary.experts


def test_a_student_may_start_as_an_expert(taught, shards, tmp_path):
    short = replace(CONFIG, init=str(taught), training=replace(TRAINING, steps=1, warmup_steps=50))
    work = Workspace.at(tmp_path / "student_work")
    train_distilled_monolith(short, {0: taught}, [shards], tmp_path / "codec", tmp_path / "distilled_monolith", work)
    student, expert = Expert.load(tmp_path / "distilled_monolith"), Expert.load(taught)
    pairs = zip(student.model.parameters(), expert.model.parameters(), strict=True)
    assert all((a - b).abs().max() < 1e-3 for a, b in pairs)
