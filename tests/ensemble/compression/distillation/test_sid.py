"""Score identity distillation: its loss, its use of data, and the quality of samples."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from ddm_core.artifacts import Preempted, Workspace
from ensemble.compression.distillation.config import SiDConfig
from ensemble.compression.distillation.mmd import median_kernel, squared_mmd
from ensemble.compression.distillation.sid import distill_sid, student_loss
from ensemble.compression.method import StageError
from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.sampling.sample import sample
from experts.conditions.condition import Condition
from experts.config import TrainingConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from router.config import SelectionConfig
from tests.ensemble.compression.acceleration.test_feature_cache import CODEC
from tests.ensemble.compression.trained import digits, trained

TRAINING = TrainingConfig(
    steps=250, batch_size=32, lr=3e-4, warmup_steps=10, t_mean=0.7, t_std=1.6, checkpoint_every=50
)
BRIEF = replace(TRAINING, steps=6, batch_size=8, checkpoint_every=2)
FULL = SamplingConfig(solver="euler", steps=1, selection=SelectionConfig(name="full"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return trained("mlp", Workspace.at(tmp_path_factory.mktemp("mlp")))


def generate(expert, sampling=FULL, count=256):
    return sample(Ensemble(experts={0: expert}, noise_schedule=RECTIFIED_FLOW), CODEC, range(count), sampling).latents


def distance(latents):
    real = digits().clean[:256].flatten(1)
    return float(squared_mmd(latents.flatten(1), real, median_kernel("rbf", real)))


class Linear(nn.Module):
    """Model whose clean estimate is `scale` times the noised sample."""

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))


def gaussian(scale, monkeypatch):
    def velocity(self, noised, t, condition, noise_schedule=None):
        return (noised - self.model.scale * noised) / t.reshape(-1, 1)

    monkeypatch.setattr(Expert, "velocity", velocity)
    return Expert(
        model=Linear(scale),
        prediction="velocity",
        noise_schedule=RECTIFIED_FLOW,
        latent_shape=(2,),
        num_classes=0,
        cluster_id=0,
    )


def test_the_loss_equals_its_equation(monkeypatch):
    teacher, fake = gaussian(0.5, monkeypatch), gaussian(0.25, monkeypatch)
    clean = torch.tensor([[1.0, -2.0]], requires_grad=True)
    noise, t = torch.tensor([[0.5, 0.5]]), torch.tensor([0.4])
    noised = 0.6 * clean.detach() + 0.4 * noise
    f, g = 0.5 * noised, 0.25 * noised
    size = (clean.detach() - f).abs().mean()
    expected = (0.6 / size * (f - g) * ((f - clean.detach()) - 1.2 * (f - g))).mean()
    loss = student_loss(clean, noise, t, Condition.null(1), teacher, fake, SiDConfig())
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    loss.backward()
    assert clean.grad.abs().sum() > 0, "gradients flow through both scores into the sample"


@pytest.mark.integration
def test_one_step_without_data_beats_one_plain_step(tmp_path):
    teacher = trained("mlp", Workspace.at(tmp_path / "teacher"), 1500)
    without_data = replace(digits(), clean=torch.full_like(digits().clean, torch.nan))
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    result = distill_sid(
        teacher, without_data, SiDConfig(steps=1, training=TRAINING), Workspace.at(tmp_path / "student")
    )
    assert distance(generate(result.network)) < 0.5 * distance(generate(teacher))
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    assert result.network.few_step.times == (1.0,) and result.flops > 0


@pytest.mark.parametrize("step_type", ["renoise", "euler"])
def test_a_resumed_training_is_bit_identical(step_type, teacher, tmp_path):
    config = SiDConfig(steps=2, training=BRIEF, step_type=step_type)
    uninterrupted = distill_sid(teacher, digits(), config, Workspace.at(tmp_path / "whole")).network.model.state_dict()
    polls = 0

    def stopping():
        nonlocal polls
        polls += 1
        return polls == 4

    with pytest.raises(Preempted, match="stopped at step 3 of 6"):
        distill_sid(teacher, digits(), config, replace(Workspace.at(tmp_path / "halves"), stopping=stopping))
    resumed = distill_sid(teacher, digits(), config, Workspace.at(tmp_path / "halves")).network.model.state_dict()
    assert all(torch.equal(value, uninterrupted[name]) for name, value in resumed.items())


def test_guidance_needs_classes_and_changes_the_student(teacher, tmp_path):
    guided = SiDConfig(training=BRIEF, teacher_guidance=1.5, fake_guidance=1.5, fake_training_guidance=1.5)
    with pytest.raises(StageError, match="set all three scales to 1"):
        distill_sid(teacher, digits().without_conditions(), guided, Workspace.at(tmp_path / "a"))
    anti = SiDConfig(training=BRIEF, fake_guidance=-0.5)
    plain = SiDConfig(training=BRIEF)
    states = [
        distill_sid(teacher, digits(), config, Workspace.at(tmp_path / str(number))).network.model.state_dict()
        for number, config in enumerate((guided, anti, plain))
    ]
    name = next(iter(states[0]))
    assert not torch.equal(states[0][name], states[2][name]) and not torch.equal(states[1][name], states[2][name])


def test_a_saved_student_keeps_its_few_step_schedule(teacher, tmp_path):
    config = SiDConfig(steps=3, start=0.75, training=BRIEF)
    result = distill_sid(teacher, digits(), config, Workspace.at(tmp_path / "w"))
    result.expert.save(tmp_path / "student")
    loaded = Expert.load(tmp_path / "student")
    assert loaded.few_step == result.network.few_step and loaded.few_step.step_types == ("renoise",) * 3
    assert loaded.few_step.times == (0.75, 0.5, 0.25)
    assert torch.equal(generate(loaded, count=4), generate(result.network, count=4))
