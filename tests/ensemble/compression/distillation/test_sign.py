"""SIGN: the gradient of its score term, the networks it works with, and what an idempotent student does."""

import pytest
import torch

from ddm_core.artifacts import Workspace
from ensemble.compression.distillation.config import SignConfig
from ensemble.compression.distillation.sign import project, score_loss, train_sign
from experts.conditions.condition import Condition
from experts.config import TrainingConfig
from experts.diffusion.noise_schedule import NOISE_SCHEDULES, RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.registry import build_network
from tests.ensemble.compression.distillation.test_sid import distance, gaussian, generate
from tests.ensemble.compression.trained import NETWORKS, digits, trained

BRIEF = TrainingConfig(steps=2, batch_size=4, lr=1e-3)


def test_score_term_has_the_gradient_of_distribution_matching(monkeypatch):
    teacher, fake = gaussian(0.5, monkeypatch), gaussian(0.25, monkeypatch)
    sample = torch.tensor([[1.0, -2.0], [0.3, 0.2]], requires_grad=True)
    noise, t = torch.tensor([[0.5, 0.5], [1.0, -1.0]]), torch.tensor([0.4, 0.8])
    score_loss(sample, noise, t, Condition.null(2), teacher, fake, 1.0).backward()
    noised = (1 - t[:, None]) * sample.detach() + t[:, None] * noise
    f, g = 0.5 * noised, 0.25 * noised
    size = (sample.detach() - f).abs().mean(1, keepdim=True)
    torch.testing.assert_close(sample.grad, (g - f) / size / sample.numel())


@pytest.mark.parametrize(("kind", "schedule"), [("mlp", "cosine"), ("unet", "rectified_flow"), ("dit", "linear_beta")])
def test_every_network_and_prediction_is_trained(kind, schedule, tmp_path):
    expert = Expert(
        model=build_network(NETWORKS[kind], (1, 8, 8), 10),
        prediction="velocity" if schedule == "rectified_flow" else "noise",
        noise_schedule=NOISE_SCHEDULES[schedule],
        latent_shape=(1, 8, 8),
        num_classes=10,
        cluster_id=0,
    )
    student = train_sign(
        expert, digits(), SignConfig(training=BRIEF, guidance=2, flow_steps=2), Workspace.at(tmp_path)
    ).network
    latents, condition = digits().clean[:2], Condition.of_classes([0, -1])
    made = project(student, latents, condition)
    assert made.isfinite().all() and not torch.equal(made, project(expert, latents, condition))
    assert student.few_step.times == (1.0,) and student.few_step.is_distilled


@pytest.mark.integration
def test_student_projects_latents_and_can_be_applied_again(tmp_path):
    teacher = trained("mlp", Workspace.at(tmp_path / "teacher"), 1500)
    training = TrainingConfig(steps=600, batch_size=64, lr=1e-3, warmup_steps=10, t_mean=0.7, t_std=1.6)
    settings = {"idempotent": {}, "score alone": {"data_weight": 0, "idempotence_weight": 0}}
    clean, condition = digits().clean[-256:], digits().condition(torch.arange(256))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    corrupted = RECTIFIED_FLOW.add_noise(clean, noise, torch.full((256,), 0.3))
    errors, projected = {}, {}
    for name, weights in settings.items():
        config = SignConfig(training=training, flow_steps=4, **weights)
        student = train_sign(teacher, digits(), config, Workspace.at(tmp_path / name)).network
        made = project(student, noise, condition)
        again = project(student, made, condition)
        errors[name] = float(((again - made).square().sum() / made.square().sum()).detach())
        projected[name] = float((project(student, corrupted, condition) - clean).square().mean().detach())
        assert distance(generate(student)) < 0.5 * distance(generate(teacher))
    assert errors["idempotent"] < 0.02 < 0.1 * errors["score alone"]
    assert projected["idempotent"] < float((corrupted - clean).square().mean()) < projected["score alone"]
