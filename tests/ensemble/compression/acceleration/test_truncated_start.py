"""Truncated sampling from drafts, and base-first students."""

from dataclasses import replace

import pytest
import torch

from ddm_core.artifacts import Workspace
from ensemble.compression.acceleration.config import BaseFirstConfig, TruncateConfig
from ensemble.compression.acceleration.refiner_training import train_refiner
from ensemble.compression.acceleration.truncated_start import (
    describe_scores,
    fit_anchors,
    fit_draft,
    measure_distance,
    sample_truncated,
    score_start_times,
    start_at,
)
from ensemble.compression.distillation.mmd import FINE, median_kernel, squared_mmd
from ensemble.compression.handover import measure_recall, split_by_time
from ensemble.compression.method import StageError
from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.multi_network_experts import TruncatedExpert
from ensemble.sampling.sample import sample
from ensemble.solvers import make_noise, sample_few_step
from experts.conditions.condition import Condition
from experts.config import TrainingConfig
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.time_split import TimeSplitExpert
from router.config import SelectionConfig
from tests.ensemble.compression.acceleration.test_feature_cache import CODEC
from tests.ensemble.compression.trained import digits, trained

CONFIG = TruncateConfig(rows=256, anchors=32, training=TrainingConfig(steps=150, batch_size=64, lr=3e-3))
TUNING = TrainingConfig(steps=150, batch_size=64, lr=1e-3, warmup_steps=10)
STICKY = SamplingConfig(solver="euler", selection=SelectionConfig(name="sticky"))


@pytest.fixture(scope="module")
def expert(tmp_path_factory):
    return trained("mlp", Workspace.at(tmp_path_factory.mktemp("mlp")), 1500)


def with_draft(expert, draft, t, steps=2):
    return TruncatedExpert(
        draft=draft, refiner=replace(expert, few_step=FewStepSchedule.uniform(steps, "euler", start=t))
    )


def generate(expert, count=6):
    return sample(Ensemble(experts={0: expert}, noise_schedule=RECTIFIED_FLOW), CODEC, range(count), STICKY)


def test_anchors_are_centroids_with_shares_per_class():
    anchors = fit_anchors(digits(), 10, CONFIG)
    assert anchors.means.shape == (32, 1, 8, 8)
    torch.testing.assert_close(anchors.shares.sum(1), torch.ones(11))
    mean = (anchors.shares[-1][:, None, None, None] * anchors.means).sum(0)
    torch.testing.assert_close(mean, digits().clean.mean(0), atol=0.1, rtol=0)
    drafts = anchors(torch.randn(500, 1, 8, 8), torch.full((500,), 3))
    real = digits().clean[digits().class_id == 3].mean(0)
    assert (drafts.mean(0) - real).norm() < 0.5 * (drafts.mean(0) - digits().clean.mean(0)).norm() + 0.5


def from_noise(expert, steps):
    """Return the squared MMD of samples that start from noise."""
    samples = generate(replace(expert, few_step=FewStepSchedule.uniform(steps, "euler")), 256).latents.flatten(1)
    real = digits().clean[:256].flatten(1)
    return float(squared_mmd(samples, real, median_kernel("rbf", real, FINE)))


def halves():
    """Latents to fit drafts on, and others to score them on."""
    order = torch.randperm(len(digits()), generator=torch.Generator().manual_seed(0))
    data = digits().without_conditions()
    return data.select(order[::2]), data.select(order[1::2])


def test_the_best_start_time_beats_drafts_and_plain_sampling(expert, tmp_path):
    (data, held_out), workspace = halves(), Workspace.at(tmp_path)
    truncated = with_draft(expert, fit_draft(expert, expert, data, CONFIG, workspace)[0], 0.5)
    grid = TruncateConfig().start_time_grid
    scores = score_start_times(truncated, held_out, grid, CONFIG, workspace)
    best = min(scores, key=lambda t: scores[t])
    assert list(scores) == [n / 10 for n in range(11)] and 0.1 < best < 0.9
    assert scores[best] < 0.8 * min(scores[0.1], scores[0.9], scores[0.0], scores[1.0])
    assert scores[1.0] == pytest.approx(from_noise(expert, 2), rel=0.2)
    assert isinstance(start_at(best, truncated), TruncatedExpert)
    note = describe_scores(scores, best, is_chosen=True)
    assert f"chosen: {best:g}" in note and "warning" not in note
    assert "the unrefined draft is better" in describe_scores({0.0: 0.1, 0.9: 0.2}, 0.9, is_chosen=False)


def test_a_draft_that_no_refinement_improves_stays_as_it_is(expert, tmp_path):
    """The draft is the expert itself in many steps: two more steps from anywhere make it worse."""
    config = replace(CONFIG, draft="expert", draft_steps=40, rows=512)
    _, held_out = halves()
    draft, _ = fit_draft(expert, expert, held_out, config, Workspace.at(tmp_path))
    scores = score_start_times(
        with_draft(expert, draft, 0.5), held_out, (0.0, 0.5, 0.9, 1.0), config, Workspace.at(tmp_path)
    )
    assert min(scores, key=lambda t: scores[t]) == 0.0
    assert start_at(0.0, with_draft(expert, draft, 0.5)) is draft
    plain = start_at(1.0, with_draft(expert, draft, 0.5))
    assert torch.equal(generate(plain).latents, generate(replace(expert, few_step=plain.few_step)).latents)
    anchors = with_draft(expert, fit_anchors(digits(), 10, CONFIG), 0.5)
    with pytest.raises(StageError, match="drafts are better unrefined"):
        start_at(0.0, anchors)


def test_few_held_out_latents_have_several_samples_each(expert):
    few = halves()[1].select(torch.arange(40))
    anchors = with_draft(expert, fit_anchors(digits(), 10, CONFIG), 0.5)
    scores = [measure_distance(anchors, few, replace(CONFIG, rows=rows), start=0.5) for rows in (40, 41, 80)]
    assert scores[0] != scores[1] == scores[2]


def test_training_below_the_start_lowers_the_held_out_distance(expert, tmp_path):
    (data, held_out), config = halves(), replace(CONFIG, tune="data", tuning=TUNING)
    anchors = with_draft(expert, fit_anchors(data, 10, config), 0.5)
    tuned, flops = train_refiner(anchors, data, 0.5, config, Workspace.at(tmp_path))
    before, after = (measure_distance(each, held_out, config, start=0.5) for each in (anchors, tuned))
    assert after < 0.8 * before and flops > 0
    assert tuned.refiner.few_step == anchors.refiner.few_step and tuned.draft is anchors.draft


def test_training_from_anchors_brings_the_best_of_them_nearer(expert, tmp_path):
    (data, held_out), config = halves(), replace(CONFIG, tune="anchors", tuning=TUNING)
    anchors = with_draft(expert, fit_anchors(data, 10, config), 0.3)
    tuned, _ = train_refiner(anchors, data, 0.3, config, Workspace.at(tmp_path))
    real = held_out.clean[:200].flatten(1)

    @torch.inference_mode()
    def error(expert):
        """Return the mean distance to the nearest of one sample of every anchor."""
        means, few_step = expert.draft.means, expert.refiner.few_step
        noised = RECTIFIED_FLOW.add_noise(
            means, make_noise(range(len(means)), (1, 8, 8)), torch.full((len(means),), 0.3)
        )
        condition = Condition.null(len(means))
        samples = sample_few_step(
            lambda x, t: expert.refiner.velocity(x, t, condition), noised, few_step, RECTIFIED_FLOW, lambda step: None
        )
        return float(torch.cdist(real, samples.flatten(1)).min(1).values.mean())

    assert error(tuned) < 0.95 * error(anchors)


def test_anchors_to_tune_from_need_anchors(expert, tmp_path):
    config = replace(CONFIG, draft="expert", tune="anchors")
    with pytest.raises(StageError, match=r"tune=anchors needs accelerate\.draft=anchors, not expert; set tune=data"):
        train_refiner(with_draft(expert, expert, 0.5), digits(), 0.5, config, Workspace.at(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("draft", [pytest.param("autoregressive", marks=pytest.mark.integration), "expert"])
def test_other_drafts_beat_one_step_from_noise(draft, expert, tmp_path):
    config, data = replace(CONFIG, draft=draft), digits().without_conditions()
    generator, flops = fit_draft(expert, expert, data, config, Workspace.at(tmp_path))
    distance = measure_distance(with_draft(expert, generator, 0.2), data, config, start=0.2)
    assert distance < from_noise(expert, 1)
    assert (flops > 0) == (draft == "autoregressive")


def test_sample_truncated_equals_ensemble_sampling(expert):
    truncated = with_draft(expert, fit_anchors(digits(), 10, CONFIG), 0.4)
    with torch.inference_mode():
        samples = sample_truncated(truncated, lambda at: make_noise(range(6), (1, 8, 8), at), Condition.null(6))
    torch.testing.assert_close(samples, generate(truncated).latents)


def test_a_draft_with_almost_no_noise_stays_unchanged(expert):
    anchors = fit_anchors(digits(), 10, CONFIG)
    samples = generate(with_draft(expert, anchors, 1e-3)).latents
    nearest = torch.cdist(samples.flatten(1), anchors.means.flatten(1)).amin(1)
    assert (nearest < 0.1).all()


def test_a_missing_student_is_an_error(expert, tmp_path):
    with pytest.raises(StageError, match="there is none; add distill"):
        fit_draft(expert, expert, digits(), replace(CONFIG, draft="student"), Workspace.at(tmp_path))


def build_student(expert, steps):
    return replace(expert, few_step=FewStepSchedule.uniform(steps, "euler", is_distilled=True))


def test_the_base_takes_the_first_step(expert):
    student = build_student(expert, 4)
    mixed = split_by_time(0, student, expert, BaseFirstConfig())
    assert mixed.few_step.times == (1.0, 0.75, 0.5, 0.25)
    assert generate(mixed).calls.full_calls == {"0/1": 6.0, "0/0": 18.0}
    three_steps = split_by_time(0, student, expert, BaseFirstConfig(base_steps=3))
    assert three_steps.few_step.times == pytest.approx((1.0, 1 - 0.25 / 3, 1 - 0.5 / 3, 0.75, 0.5, 0.25))
    assert generate(three_steps).calls.full_calls == {"0/1": 18.0, "0/0": 18.0}
    later = replace(student, few_step=FewStepSchedule.uniform(2, "renoise", start=0.8, is_distilled=True))
    assert split_by_time(0, later, expert, BaseFirstConfig(base_steps=2)).few_step.times == (1.0, 0.7, 0.4), (
        "from pure noise"
    )


def test_guidance_of_the_base_is_that_of_its_steps_alone(expert, tmp_path):
    plain, guided = (
        split_by_time(0, build_student(expert, 2), expert, BaseFirstConfig(guidance=scale)) for scale in (None, 3)
    )
    guided.save(tmp_path / "guided")
    loaded = TimeSplitExpert.load(tmp_path / "guided")
    noised, condition = torch.randn(3, 1, 8, 8), Condition(torch.tensor([1, 2, -1]))
    first, second, third = (
        each.velocity(noised, torch.ones(3), condition, RECTIFIED_FLOW) for each in (plain, guided, loaded)
    )
    null = expert.velocity(noised, torch.ones(3), Condition.null(3))
    torch.testing.assert_close(second, null + 3 * (first - null), atol=1e-4, rtol=1e-4)
    assert torch.equal(third, second) and not torch.equal(first, second)
    late = [each.velocity(noised, torch.full((3,), 0.5), condition, RECTIFIED_FLOW) for each in (plain, guided)]
    assert torch.equal(*late)
    assert generate(guided).calls.full_calls == {"0/1": 12.0, "0/0": 6.0}


def test_recall_is_that_of_the_samples(expert):
    held_out = halves()[1]
    many, one = (
        TimeSplitExpert(experts=(expert,), bounds=(), few_step=FewStepSchedule.uniform(steps, "euler"))
        for steps in (20, 1)
    )
    recalls = [measure_recall(each, held_out, 128) for each in (many, one)]
    assert recalls[0] > recalls[1] + 0.1 and recalls[0] == measure_recall(many, held_out, 128)


def test_a_base_equal_to_its_student_changes_nothing(expert):
    student = build_student(expert, 4)
    torch.testing.assert_close(
        generate(split_by_time(0, student, expert, BaseFirstConfig())).latents, generate(student).latents
    )


@pytest.mark.parametrize("steps", [None, 1])
def test_a_student_without_two_steps_is_an_error(steps, expert):
    student = expert if steps is None else build_student(expert, steps)
    with pytest.raises(StageError, match="add distill=…|has only one"):
        split_by_time(0, student, expert, BaseFirstConfig())


def test_a_saved_expert_keeps_its_few_step_schedule(expert, tmp_path):
    mixed = split_by_time(0, build_student(expert, 4), expert, BaseFirstConfig())
    mixed.save(tmp_path / "mixed")
    loaded = TimeSplitExpert.load(tmp_path / "mixed")
    assert loaded.few_step == mixed.few_step and loaded.bounds == mixed.bounds
    assert torch.equal(generate(loaded).latents, generate(mixed).latents)
