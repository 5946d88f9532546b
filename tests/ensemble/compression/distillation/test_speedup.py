"""SpeedUpNet: one guided call a step, without guidance the expert as it was, and branches that move to others."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from ddm_core.artifacts import Workspace
from ensemble.compression.distillation.config import SpeedUpNetConfig
from ensemble.compression.distillation.speedup import mean_velocity, train_speedup
from ensemble.compression.method import StageError
from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.pipelines.guided_field import Guidance, GuidedField
from ensemble.sampling.sample import sample
from experts.compressed.distillation.guidance_branch import copy_branches
from experts.conditions.condition import Condition
from experts.config import TrainingConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.networks.lora import add_new_lora
from router.config import SelectionConfig
from tests.ensemble.compression.acceleration.test_feature_cache import CODEC
from tests.ensemble.compression.trained import digits, trained

TRAINING = TrainingConfig(steps=150, batch_size=32, lr=3e-3, warmup_steps=10)
GUIDED = SamplingConfig(solver="euler", steps=4, selection=SelectionConfig(name="full"), guidance_scale=3)
CLASSES = Condition.of_classes([k % 10 for k in range(64)])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return trained("mlp", Workspace.at(tmp_path_factory.mktemp("mlp")), 400)


@pytest.fixture(scope="module")
def guiding(teacher, tmp_path_factory):
    config = SpeedUpNetConfig(training=TRAINING)
    return train_speedup(teacher, digits(), config, Workspace.at(tmp_path_factory.mktemp("work"))).network


def ensemble_of(expert):
    return Ensemble(experts={0: expert}, noise_schedule=RECTIFIED_FLOW)


def draw(expert, config=GUIDED, negative=None):
    return sample(ensemble_of(expert), CODEC, range(64), config, CLASSES, negative=negative)


def error(expert, teacher, negative=None):
    """Return the distance to samples of two calls, over that of samples without guidance."""
    exact, plain = draw(teacher, negative=negative).latents, draw(teacher, replace(GUIDED, guidance_scale=1)).latents
    return float((draw(expert, negative=negative).latents - exact).norm() / (plain - exact).norm())


def test_a_guided_step_is_one_call_and_close_to_two(teacher, guiding):
    result = draw(guiding)
    assert (result.calls_per_step, draw(teacher).calls_per_step) == (1, 2)
    assert error(guiding, teacher) < 0.5
    assert error(guiding, teacher, Condition.of_classes([3] * 64)) < 0.8


def test_without_guidance_an_expert_stays_as_it_was(teacher, guiding, tmp_path):
    plain = replace(GUIDED, guidance_scale=1)
    guiding.save(tmp_path)
    loaded = Expert.load(tmp_path)
    assert torch.equal(draw(loaded, plain).latents, draw(teacher, plain).latents)
    assert torch.equal(draw(loaded).latents, draw(guiding).latents)
    parameters = guiding.model.state_dict()
    assert all(torch.equal(value, parameters[name]) for name, value in teacher.model.state_dict().items())
    assert guiding.call_flops(RECTIFIED_FLOW).mean > teacher.call_flops(RECTIFIED_FLOW).mean


def test_a_pipeline_guides_in_one_call_within_the_interval(guiding):
    ensemble, seeds = ensemble_of(guiding), range(4)
    condition, noised = CLASSES.rows(slice(0, 4)), torch.randn(4, 1, 8, 8)
    routing = ensemble.init_routing(seeds, condition, GUIDED.selection)
    guidance = Guidance(scale=3.0, interval=(0.2, 0.8))
    field = GuidedField.start(ensemble, condition, Condition.null(4), routing, guidance)
    at = lambda t: torch.full((4,), t)  # noqa: E731
    assert torch.equal(field.velocity(noised, 0.9, 0), guiding.velocity(noised, at(0.9), condition))
    guided = guiding.velocity(noised, at(0.5), condition.guided(3.0))
    assert torch.equal(field.velocity(noised, 0.5, 1), guided)
    assert sum(field.routing.calls.full_calls.values()) == 8


def test_branches_work_in_an_expert_with_an_adapter(teacher, guiding):
    tuned = deepcopy(teacher.model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        add_new_lora(tuned, ["blocks.0.inner", "entry"], 2)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    tuned_expert = replace(teacher, model=tuned)
    moved = replace(teacher, model=copy_branches(guiding.model, deepcopy(tuned)))
    assert not torch.equal(draw(tuned_expert).latents, draw(teacher).latents)
    assert error(moved, tuned_expert) < 0.6


def test_target_of_several_steps_is_their_mean_velocity():
    """dx/dt = a x has the solution x_end = x_t exp(a (end - t)); one step is the velocity itself."""
    x, t, end = torch.tensor([[2.0], [-1.0]]), torch.tensor([1.0, 0.5]), torch.tensor([0.75, 0.4])
    field = lambda x, t: 0.5 * x  # noqa: E731
    exact = x * (torch.exp(0.5 * (end - t)) - 1)[:, None] / (end - t)[:, None]
    torch.testing.assert_close(mean_velocity(field, x, t, end, 2000), exact, rtol=1e-4, atol=0)
    torch.testing.assert_close(mean_velocity(field, x, t, end, 1), field(x, t))
    turned = mean_velocity(lambda x, t: t[:, None].expand_as(x), x, t, end, 2)
    torch.testing.assert_close(turned[:, 0], (3 * t + end) / 4)


def test_consistency_over_several_steps_ends_nearer_to_them(teacher, guiding, tmp_path):
    config = SpeedUpNetConfig(training=TRAINING, steps=2, substeps=8)
    student = train_speedup(teacher, digits(), config, Workspace.at(tmp_path)).network
    exact = draw(teacher, replace(GUIDED, steps=16)).latents
    in_two = replace(GUIDED, steps=2)
    result = draw(student, in_two)
    assert result.calls_per_step == 1 and student.few_step.times == (1.0, 0.5)
    assert (result.latents - exact).norm() < 0.9 * (draw(guiding, in_two).latents - exact).norm()


def test_experts_without_conditions_are_refused(teacher, tmp_path):
    with pytest.raises(StageError, match=r"distill\.guidance=6\.0 needs an expert that was trained with classes"):
        train_speedup(teacher, digits().without_conditions(), SpeedUpNetConfig(), Workspace.at(tmp_path))
