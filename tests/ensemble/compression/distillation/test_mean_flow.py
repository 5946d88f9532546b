"""Mean flows: the exact average velocity is a fixed point, training finds it, and students sample by it."""

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from ddm_core.artifacts import Preempted, Workspace
from ensemble.compression.distillation.config import MeanFlowConfig, SCMConfig, SignConfig
from ensemble.compression.distillation.mean_flow import (
    MeanFlow,
    mean_flow_losses,
    sample_jumps,
    sample_scales,
    train_mean_flow,
)
from ensemble.compression.distillation.scm import train_scm
from ensemble.compression.distillation.sign import train_sign
from ensemble.compression.method import StageError
from ensemble.ensemble import Ensemble
from ensemble.sampling.sample import guidance_scale_of, sample
from experts.conditions.condition import Condition
from experts.config import TrainingConfig
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import NOISE_SCHEDULES, NoiseSchedule, expand
from experts.expert import Expert
from experts.networks.registry import extend_by_intervals
from tests.ensemble.compression.acceleration.test_feature_cache import CODEC
from tests.ensemble.compression.distillation.test_sid import FULL, distance, generate
from tests.ensemble.compression.trained import digits, trained
from tests.oracles import gaussian_velocity

MEAN, DEVIATION = torch.tensor([1.0, -0.5], dtype=torch.float64), 0.4
TRAINING = TrainingConfig(steps=400, batch_size=64, lr=1e-3, warmup_steps=10, t_mean=0.4, t_std=1.6)
BRIEF = TrainingConfig(steps=6, batch_size=8, lr=3e-4, warmup_steps=2, checkpoint_every=2)
METHODS = {
    "mean_flow": (train_mean_flow, MeanFlowConfig),
    "scm": (train_scm, SCMConfig),
    "rcm": (train_scm, partial(SCMConfig, score_weight=0.5)),
    "sign": (train_sign, SignConfig),
}
each_method = pytest.mark.parametrize("method", METHODS)


@dataclass(frozen=True)
class ExactTeacher:
    """The velocity of a Gaussian."""

    noise_schedule: NoiseSchedule

    def velocity(self, noised, t, condition, noise_schedule=None):
        return gaussian_velocity(noised, t, MEAN, DEVIATION, noise_schedule or self.noise_schedule)


class Deviation(nn.Module):
    """Network of a Gaussian's flow, whose only parameter is the deviation."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))


@dataclass(frozen=True, kw_only=True)
class GaussianFlow(MeanFlow):
    """The average velocity of a Gaussian's flow in closed form, instead of a network's."""

    noise_schedule: NoiseSchedule

    def average(self, noised, t, r):
        t, r = expand(t, noised), expand(r, noised)
        schedule, value = self.noise_schedule, self.student.model.value

        def deviation(time):
            return ((schedule.alpha(time) * value) ** 2 + schedule.sigma(time) ** 2).sqrt()

        centered = noised - schedule.alpha(t) * MEAN
        slope = schedule.alpha(t) * schedule.alpha_dot(t) * value**2 + schedule.sigma(t) * schedule.sigma_dot(t)
        velocity = schedule.alpha_dot(t) * MEAN + slope / deviation(t) ** 2 * centered
        jump = noised - schedule.alpha(r) * MEAN - deviation(r) / deviation(t) * centered
        return torch.where(t > r, jump / (t - r).clamp(min=1e-6), velocity)


def gaussian_flow(value, noise_schedule, rows):
    student = replace(trained_like(noise_schedule), model=Deviation(value))
    teacher = ExactTeacher(noise_schedule=noise_schedule)
    return GaussianFlow(student=student, teacher=teacher, condition=Condition.null(rows), noise_schedule=noise_schedule)


def trained_like(noise_schedule):
    return Expert(
        model=nn.Identity(),
        prediction="velocity",
        noise_schedule=noise_schedule,
        latent_shape=(2,),
        num_classes=0,
        cluster_id=0,
    )


def draw(noise_schedule, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(rows, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    clean = MEAN + DEVIATION * clean
    t = torch.rand(rows, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    r = t * torch.rand(rows, generator=generator, dtype=torch.float64)
    r[::4] = t[::4]
    return noise_schedule.add_noise(clean, noise, t), t, r, noise_schedule.velocity(clean, noise, t)


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_the_exact_average_velocity_is_a_fixed_point(name):
    schedule = NOISE_SCHEDULES[name]
    noised, t, r, velocity = draw(schedule, 64)
    config = MeanFlowConfig(velocity="expert", derivative_step=0)
    gradients = {}
    for value in (DEVIATION, 1.5 * DEVIATION):
        flow = gaussian_flow(value, schedule, 64)
        average, target = flow.average(noised, t, r), flow.target(noised, t, r, velocity, config)
        if value == DEVIATION:
            torch.testing.assert_close(average.detach(), target, atol=1e-6, rtol=1e-6)
        mean_flow_losses(average, target, power=0.0)["loss"].backward()
        gradients[value] = abs(float(flow.student.model.value.grad))
    assert gradients[DEVIATION] < 1e-6 * gradients[1.5 * DEVIATION]


@pytest.mark.parametrize("velocity", ["student", "data", "expert"])
def test_training_finds_the_exact_average_velocity(velocity):
    schedule = NOISE_SCHEDULES["rectified_flow"]
    flow, config = gaussian_flow(1.2, schedule, 256), MeanFlowConfig(velocity=velocity, derivative_step=0)
    optimizer = torch.optim.Adam(flow.student.model.parameters(), lr=0.03)
    for step in range(150):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 150)
        noised, t, r, sampled = draw(schedule, 256, seed=step)
        loss = mean_flow_losses(flow.average(noised, t, r), flow.target(noised, t, r, sampled, config), power=0.0)[
            "loss"
        ]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(flow.student.model.value.detach()) == pytest.approx(DEVIATION, abs=0.02)


def test_jumps_go_back_and_some_have_no_length():
    config = MeanFlowConfig(velocity_share=0.5)
    t, r = sample_jumps(torch.rand(2000, generator=torch.Generator().manual_seed(0)), config, step=3)
    assert (t >= r).all() and 0.4 < float((t == r).double().mean()) < 0.6
    assert torch.equal(sample_jumps(t, config, step=3)[1], sample_jumps(t, config, step=3)[1])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return trained("mlp", Workspace.at(tmp_path_factory.mktemp("mlp")))


def distill(method, teacher, folder, dataset=None, **settings):
    train, config = METHODS[method]
    return train(teacher, dataset or digits(), config(**{"training": BRIEF} | settings), folder).network


@each_method
def test_a_resumed_training_is_bit_identical(method, teacher, tmp_path):
    whole = distill(method, teacher, Workspace.at(tmp_path / "whole")).model.state_dict()
    polls = 0

    def stopping():
        nonlocal polls
        polls += 1
        return polls == 4

    with pytest.raises(Preempted, match="stopped at step 3 of 6"):
        distill(method, teacher, replace(Workspace.at(tmp_path / "halves"), stopping=stopping))
    resumed = distill(method, teacher, Workspace.at(tmp_path / "halves")).model.state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


@each_method
def test_guidance_needs_classes_and_changes_the_student(method, teacher, tmp_path):
    with pytest.raises(StageError, match=r"distill\.guidance=2\.0 needs an expert .* set it to 1"):
        distill(method, teacher, Workspace.at(tmp_path / "a"), digits().without_conditions(), guidance=2.0)
    guided, plain = (
        distill(method, teacher, Workspace.at(tmp_path / str(scale)), guidance=scale).model.state_dict()
        for scale in (2.0, 1.0)
    )
    assert any(not torch.equal(value, plain[name]) for name, value in guided.items())


@each_method
def test_a_student_of_a_student_is_refused(method, teacher, tmp_path):
    student = replace(teacher, few_step=FewStepSchedule.uniform(2, "renoise", is_distilled=True))
    with pytest.raises(StageError, match="expert 0 is a few-step student; leave out the stage before"):
        distill(method, student, Workspace.at(tmp_path))


@pytest.mark.parametrize(("method", "steps"), [("mean_flow", 2), ("mean_flow", 4), ("scm", 2), ("rcm", 2), ("sign", 1)])
def test_a_saved_student_samples_the_same_alone_and_in_a_batch(method, steps, teacher, tmp_path):
    student = distill(method, teacher, Workspace.at(tmp_path / "work"), steps=steps)
    student.save(tmp_path / "student")
    loaded = Expert.load(tmp_path / "student")
    images = generate(student, count=4)
    assert torch.equal(generate(loaded, count=4), images)
    torch.testing.assert_close(generate(loaded, count=1), images[:1], atol=1e-5, rtol=1e-5)
    assert loaded.few_step.times == tuple(1 - index / steps for index in range(steps))


def test_the_length_of_a_jump_changes_the_prediction(teacher, tmp_path):
    student = distill("mean_flow", teacher, Workspace.at(tmp_path), training=replace(BRIEF, lr=0.01))
    noised, condition = torch.randn(2, 1, 8, 8), Condition.null(2)
    one, two = (
        replace(student, few_step=FewStepSchedule.uniform(steps, "average")).velocity(noised, torch.ones(2), condition)
        for steps in (1, 2)
    )
    plain = replace(student, few_step=None).velocity(noised, torch.ones(2), condition)
    assert not torch.equal(one, two) and not torch.equal(two, plain)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("method", "settings", "training_steps"),
    [("mean_flow", {"steps": 2}, 1200), ("mean_flow", {"velocity": "expert"}, 1200), ("scm", {"steps": 1}, 400)],
)
def test_few_student_steps_beat_one_plain_step(method, settings, training_steps, tmp_path):
    teacher = trained("mlp", Workspace.at(tmp_path / "teacher"), 1500)
    center = {"t_mean": -0.3, "t_std": 1.4} if method == "scm" else {}
    training = replace(TRAINING, steps=training_steps, **center)
    student = distill(method, teacher, Workspace.at(tmp_path / "student"), training=training, **settings)
    assert distance(generate(student)) < 0.6 * distance(generate(teacher))


@pytest.mark.integration
def test_two_jumps_of_a_transformer_are_as_good_as_fifty_steps(tmp_path):
    teacher = trained("dit", Workspace.at(tmp_path / "teacher"), 800)
    settings = {"velocity": "expert", "steps": 2, "training": replace(TRAINING, steps=500)}
    student = distill("mean_flow", teacher, Workspace.at(tmp_path / "student"), **settings)
    assert distance(generate(student)) < 1.1 * distance(generate(teacher, replace(FULL, steps=50)))


def test_scales_are_spaced_by_their_logarithm():
    torch.manual_seed(0)
    scales = sample_scales(4000, 9.0)
    assert float(scales.min()) >= 1 and float(scales.max()) <= 9
    assert float(scales.median()) == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("velocity", ["expert", "data"])
def test_targets_are_guided_by_the_scale_of_each_row(velocity, teacher):
    torch.manual_seed(0)
    noised, t, sampled = torch.randn(6, 1, 8, 8), torch.linspace(0.2, 0.9, 6), torch.randn(6, 1, 8, 8)
    condition, scale = Condition(torch.tensor([0, 1, 2, -1, 4, 5])), torch.tensor([1.0, 1.5, 2.0, 3.0, 4.0, 2.5])
    student = replace(teacher, model=extend_by_intervals(deepcopy(teacher.model), has_guidance=True))
    flow = MeanFlow(student=student, teacher=teacher, condition=condition, scale=scale)
    got = flow.target(noised, t, t, sampled, MeanFlowConfig(velocity=velocity, max_guidance=4.0))
    for row, w in enumerate(scale.tolist()):
        at = slice(row, row + 1)
        null = teacher.velocity(noised[at], t[at], Condition.null(1))
        own = sampled[at] if velocity == "data" else teacher.velocity(noised[at], t[at], condition.rows(at))
        expected = own if row == 3 else null + w * (own - null)
        torch.testing.assert_close(got[at], expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def scaled(teacher, tmp_path_factory):
    settings = {"velocity": "expert", "max_guidance": 4.0, "steps": 2, "training": replace(BRIEF, lr=0.01)}
    return distill("mean_flow", teacher, Workspace.at(tmp_path_factory.mktemp("scaled")), **settings)


def test_the_scale_is_an_input_in_one_call_a_jump(scaled, tmp_path):
    scaled.save(tmp_path)
    loaded = Expert.load(tmp_path)
    noised, t, classes = torch.randn(3, 1, 8, 8), torch.ones(3), Condition(torch.tensor([1, -1, 2]))
    plain, one, three = (
        loaded.velocity(noised, t, condition) for condition in (classes, classes.guided(1.0), classes.guided(3.0))
    )
    assert torch.equal(plain, one), "1 is no guidance"
    assert torch.equal(three[1], plain[1]), "nor is there any without a condition"
    assert not torch.allclose(three[0], plain[0]) and not torch.allclose(three[2], plain[2])
    assert loaded.guides_in_one_call
    with pytest.raises(ValueError, match="away from the null condition alone; leave the negative prompt out"):
        loaded.velocity(noised, t, classes.guided(2.0, Condition(torch.tensor([5, 5, 5]))))
    samples = {}
    for scale in (1.0, 3.0):
        ensemble = Ensemble(experts={0: loaded}, noise_schedule=NOISE_SCHEDULES["rectified_flow"])
        assert guidance_scale_of(ensemble, replace(FULL, guidance_scale=scale)) == scale
        samples[scale] = sample(ensemble, CODEC, range(3), replace(FULL, guidance_scale=scale), condition=classes)
        assert sum(samples[scale].calls.full_calls.values()) == 3 * 2
    assert not torch.allclose(samples[1.0].latents, samples[3.0].latents)


def test_a_student_of_one_scale_refuses_others(teacher, tmp_path):
    student = distill("mean_flow", teacher, Workspace.at(tmp_path), guidance=2.0)
    ensemble = Ensemble(experts={0: student}, noise_schedule=NOISE_SCHEDULES["rectified_flow"])
    assert ensemble.includes_guidance and guidance_scale_of(ensemble, replace(FULL, guidance_scale=3.0)) == 1
    with pytest.raises(ValidationError, match=r"distill\.guidance=2\.0 fixes it; leave one of them out"):
        MeanFlowConfig(guidance=2.0, max_guidance=4.0)
    with pytest.raises(StageError, match=r"distill\.max_guidance=4\.0 needs an expert .* set it to null"):
        distill("mean_flow", teacher, Workspace.at(tmp_path / "b"), digits().without_conditions(), max_guidance=4.0)
