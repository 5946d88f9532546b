"""Score identity distillation: its loss, what it may look at, and what comes of it."""

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
from experts.condition import Condition
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


def drawn(expert, sampling=FULL, count=256):
    return sample(Ensemble(experts={0: expert}, noise_schedule=RECTIFIED_FLOW), CODEC, range(count), sampling).latents


def distance(latents):
    real = digits().clean[:256].flatten(1)
    return float(squared_mmd(latents.flatten(1), real, median_kernel("rbf", real)))


class Linear(nn.Module):
    """Calls every noised sample's clean part `scale` times it."""

    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))


def gaussian(scale, monkeypatch):
    def velocity(self, noised, t, condition, path=None):
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


def test_the_loss_is_its_equation(monkeypatch):
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
    assert clean.grad.abs().sum() > 0, "gradients run through both scores into the sample"


@pytest.mark.slow
def test_one_step_is_nearer_to_the_data_than_one_plain_step_and_no_sample_was_looked_at(tmp_path):
    teacher = trained("mlp", Workspace.at(tmp_path / "teacher"), 1500)
    blind = replace(digits(), clean=torch.full_like(digits().clean, torch.nan))
    before = {name: value.clone() for name, value in teacher.model.state_dict().items()}
    outcome = distill_sid(teacher, blind, SiDConfig(steps=1, training=TRAINING), Workspace.at(tmp_path / "student"))
    assert distance(drawn(outcome.network)) < 0.5 * distance(drawn(teacher))
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())
    assert outcome.network.few_step.times == (1.0,) and outcome.flops > 0


@pytest.mark.parametrize("renoise", ["renoise", "euler"])
def test_stopped_anywhere_and_started_again_it_gives_the_same_bits(renoise, teacher, tmp_path):
    config = SiDConfig(steps=2, training=BRIEF, step_type=renoise)
    whole = distill_sid(teacher, digits(), config, Workspace.at(tmp_path / "whole")).network.model.state_dict()
    asked = 0

    def stopping():
        nonlocal asked
        asked += 1
        return asked == 4

    with pytest.raises(Preempted, match="stopped at step 3 of 6"):
        distill_sid(teacher, digits(), config, replace(Workspace.at(tmp_path / "halves"), stopping=stopping))
    again = distill_sid(teacher, digits(), config, Workspace.at(tmp_path / "halves")).network.model.state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in again.items())


def test_guidance_without_classes_is_refused_and_with_them_it_makes_a_difference(teacher, tmp_path):
    guided = SiDConfig(training=BRIEF, teacher_guidance=1.5, fake_guidance=1.5, fake_training_guidance=1.5)
    with pytest.raises(StageError, match="set all three scales to 1"):
        distill_sid(teacher, digits().unlabelled(), guided, Workspace.at(tmp_path / "a"))
    anti = SiDConfig(training=BRIEF, fake_guidance=-0.5)
    plain = SiDConfig(training=BRIEF)
    found = [
        distill_sid(teacher, digits(), config, Workspace.at(tmp_path / str(number))).network.model.state_dict()
        for number, config in enumerate((guided, anti, plain))
    ]
    name = next(iter(found[0]))
    assert not torch.equal(found[0][name], found[2][name]) and not torch.equal(found[1][name], found[2][name])


def test_the_students_folder_knows_its_course(teacher, tmp_path):
    config = SiDConfig(steps=3, start=0.75, training=BRIEF)
    outcome = distill_sid(teacher, digits(), config, Workspace.at(tmp_path / "w"))
    outcome.expert.save(tmp_path / "student")
    again = Expert.load(tmp_path / "student")
    assert again.few_step == outcome.network.few_step and again.few_step.step_types == ("renoise",) * 3
    assert again.few_step.times == (0.75, 0.5, 0.25)
    assert torch.equal(drawn(again, count=4), drawn(outcome.network, count=4))
