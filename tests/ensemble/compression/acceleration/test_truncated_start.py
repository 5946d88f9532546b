"""Trajectories that begin with a draft, and first steps by the base: what is made of an ensemble's folder."""

from dataclasses import replace

import pytest
import torch

from ddm_core.artifacts import Workspace
from ensemble.compression.acceleration.config import BaseFirstConfig, TruncateConfig
from ensemble.compression.acceleration.truncated_start import (
    distance,
    fit_anchors,
    fit_draft,
    score_start_times,
    truncated_sample,
    with_start_time,
)
from ensemble.compression.distillation.mmd import FINE, median_kernel, squared_mmd
from ensemble.compression.handover import split_by_time
from ensemble.compression.method import StageError
from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.multi_network_experts import TimeSplitExpert, TruncatedExpert
from ensemble.sampling.sample import sample
from ensemble.solvers import noise_for
from experts.condition import Condition
from experts.config import TrainingConfig
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from router.config import SelectionConfig
from tests.ensemble.compression.acceleration.test_feature_cache import CODEC
from tests.ensemble.compression.trained import digits, trained

CONFIG = TruncateConfig(rows=256, anchors=32, training=TrainingConfig(steps=150, batch_size=64, lr=3e-3))
STICKY = SamplingConfig(solver="euler", selection=SelectionConfig(name="sticky"))


@pytest.fixture(scope="module")
def expert(tmp_path_factory):
    return trained("mlp", Workspace.at(tmp_path_factory.mktemp("mlp")), 1500)


def drafted(expert, draft, t, steps=2):
    return TruncatedExpert(
        draft=draft, refiner=replace(expert, few_step=FewStepSchedule.uniform(steps, "euler", start=t))
    )


def sampled(expert, count=6):
    return sample(Ensemble(experts={0: expert}, noise_schedule=RECTIFIED_FLOW), CODEC, range(count), STICKY)


def test_anchors_lie_among_their_latents_and_have_their_shares():
    anchors = fit_anchors(digits(), 10, CONFIG)
    assert anchors.means.shape == (32, 1, 8, 8)
    torch.testing.assert_close(anchors.shares.sum(1), torch.ones(11))
    mean = (anchors.shares[-1][:, None, None, None] * anchors.means).sum(0)
    torch.testing.assert_close(mean, digits().clean.mean(0), atol=0.1, rtol=0)
    drawn = anchors(torch.randn(500, 1, 8, 8), torch.full((500,), 3))
    real = digits().clean[digits().class_id == 3].mean(0)
    assert (drawn.mean(0) - real).norm() < 0.5 * (drawn.mean(0) - digits().clean.mean(0)).norm() + 0.5


def from_noise(expert, steps):
    """The squared MMD of plain samples."""
    drawn = sampled(replace(expert, few_step=FewStepSchedule.uniform(steps, "euler")), 256).latents.flatten(1)
    real = digits().clean[:256].flatten(1)
    return float(squared_mmd(drawn, real, median_kernel("rbf", real, FINE)))


def test_the_best_beginning_lies_inside_and_beats_both_the_draft_and_plain_steps(expert, tmp_path):
    data, space = digits().unlabelled(), Workspace.at(tmp_path)
    one = drafted(expert, fit_draft(expert, expert, data, CONFIG, space)[0], 0.5)
    curve = score_start_times(one, data, CONFIG, space)
    best = min(curve, key=lambda t: curve[t])
    assert 0.1 < best < 0.9 and curve[best] < 0.8 * min(curve[0.1], curve[0.9])
    assert curve[best] == distance(with_start_time(best, one), data, CONFIG)
    assert curve[best] < 0.8 * distance(one, data, CONFIG, drafts_only=True)
    assert curve[best] < 0.8 * from_noise(expert, 2)


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["autoregressive", "expert"])
def test_other_drafts_are_better_than_a_step_from_noise(draft, expert, tmp_path):
    config, data = replace(CONFIG, draft=draft), digits().unlabelled()
    made, flops = fit_draft(expert, expert, data, config, Workspace.at(tmp_path))
    assert distance(drafted(expert, made, 0.2), data, config) < from_noise(expert, 1)
    assert (flops > 0) == (draft == "autoregressive")


def test_truncated_sample_is_what_the_ensemble_samples(expert):
    one = drafted(expert, fit_anchors(digits(), 10, CONFIG), 0.4)
    with torch.inference_mode():
        ours = truncated_sample(one, lambda at: noise_for(range(6), (1, 8, 8), at), Condition.null(6))
    torch.testing.assert_close(ours, sampled(one).latents)


def test_a_draft_that_begins_at_nearly_nothing_stays_as_it_is(expert):
    anchors = fit_anchors(digits(), 10, CONFIG)
    drawn = sampled(drafted(expert, anchors, 1e-3)).latents
    nearest = torch.cdist(drawn.flatten(1), anchors.means.flatten(1)).amin(1)
    assert (nearest < 0.1).all()


def test_a_student_is_asked_for_where_there_is_none(expert, tmp_path):
    with pytest.raises(StageError, match="there is none; add distill"):
        fit_draft(expert, expert, digits(), replace(CONFIG, draft="student"), Workspace.at(tmp_path))


def student_of(expert, steps):
    return replace(expert, few_step=FewStepSchedule.uniform(steps, "euler", is_distilled=True))


def test_the_base_takes_the_first_step_and_the_student_the_others(expert):
    student = student_of(expert, 4)
    mixed = split_by_time(0, student, expert, BaseFirstConfig())
    assert mixed.few_step.times == (1.0, 0.75, 0.5, 0.25)
    work = sampled(mixed).calls.full_calls
    assert work == {"0/1": 6.0, "0/0": 18.0}
    twice = split_by_time(0, student, expert, BaseFirstConfig(base_steps=3))
    assert twice.few_step.times == pytest.approx((1.0, 1 - 0.25 / 3, 1 - 0.5 / 3, 0.75, 0.5, 0.25))
    assert sampled(twice).calls.full_calls == {"0/1": 18.0, "0/0": 18.0}
    later = replace(student, few_step=FewStepSchedule.uniform(2, "renoise", start=0.8, is_distilled=True))
    assert split_by_time(0, later, expert, BaseFirstConfig(base_steps=2)).few_step.times == (1.0, 0.7, 0.4), (
        "from pure noise"
    )


def test_a_base_that_is_its_own_student_changes_nothing(expert):
    student = student_of(expert, 4)
    torch.testing.assert_close(
        sampled(split_by_time(0, student, expert, BaseFirstConfig())).latents, sampled(student).latents
    )


@pytest.mark.parametrize("steps", [None, 1])
def test_without_a_student_of_two_steps_there_is_nothing_to_take_over(steps, expert):
    student = expert if steps is None else student_of(expert, steps)
    with pytest.raises(StageError, match="add distill=…|has no other"):
        split_by_time(0, student, expert, BaseFirstConfig())


def test_a_schedules_course_is_kept_in_its_folder(expert, tmp_path):
    mixed = split_by_time(0, student_of(expert, 4), expert, BaseFirstConfig())
    mixed.save(tmp_path / "mixed")
    again = TimeSplitExpert.load(tmp_path / "mixed")
    assert again.few_step == mixed.few_step and again.bounds == mixed.bounds
    assert torch.equal(sampled(again).latents, sampled(mixed).latents)
