"""Few-step courses, and trajectories that begin with a draft."""

from dataclasses import replace

import pytest
import torch

from ddm_core.artifacts import CorruptArtifact, write_json
from ensemble.compression.distillation.student import predict_clean, rollout_to
from ensemble.config import ReflectionConfig, SamplingConfig
from ensemble.ensemble import Ensemble, EnsembleError
from ensemble.evaluation.generate import RowFlops
from ensemble.multi_network_experts import OF_DRAFT, TRUNCATED, TruncatedExpert
from ensemble.pipeline import DDMPipeline
from ensemble.sampling.sample import sample
from ensemble.solvers import noise_for
from experts.architectures.draft_generators import Anchors, Autoregressive
from experts.codec import PixelCodec
from experts.compressed.caching.feature_cache import ExpertCache
from experts.condition import Condition
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.expert import Expert
from experts.training.flops import forward_flops
from router.config import SelectionConfig
from tests.ensemble.test_pipeline import SHAPE, make_expert, parts, put_together
from tests.oracles import IdentityCodec, MixtureOfGaussians, Oracle

__all__ = ["parts"]

STICKY = SamplingConfig(solver="euler", steps=3, selection=SelectionConfig(name="sticky"))


class FewStepOracle(Oracle):
    """An exact expert with a course."""

    few_step: FewStepSchedule | None = None


def ensemble_of(course, deviation=0.5):
    expert = FewStepOracle(torch.tensor([2.0, -1.0]), deviation)
    expert.few_step = course
    return Ensemble(experts={0: expert}, noise_schedule=RECTIFIED_FLOW), expert


def test_seeds_may_be_as_large_as_they_are_elsewhere():
    for seed in (2**63, 2**64 - 1, 7):
        assert torch.equal(noise_for([seed], (2,), 3), noise_for([seed], (2,), 3))


def test_euler_ways_are_eulers_method_whatever_solver_is_asked_for():
    plain = Ensemble(experts={0: Oracle(torch.tensor([2.0, -1.0]), 0.5)}, noise_schedule=RECTIFIED_FLOW)
    coursed, expert = ensemble_of(FewStepSchedule.uniform(3, "euler"))
    ours = sample(coursed, IdentityCodec(), range(6), replace(STICKY, solver="heun", steps=40))
    assert expert.calls == 3 and ours.calls.evaluations == 18
    torch.testing.assert_close(ours.latents, sample(plain, IdentityCodec(), range(6), STICKY).latents)


def test_fresh_noise_gives_the_right_distribution_with_many_steps_and_is_each_samples_own():
    coursed, _ = ensemble_of(FewStepSchedule.uniform(1, "renoise"))
    once = sample(coursed, IdentityCodec(), range(400), STICKY).latents
    torch.testing.assert_close(once, torch.tensor([2.0, -1.0]).expand(400, 2), atol=1e-5, rtol=0)
    coursed, _ = ensemble_of(FewStepSchedule.uniform(40, "renoise"))
    drawn = sample(coursed, IdentityCodec(), range(2000), STICKY).latents
    torch.testing.assert_close(drawn.mean(0), torch.tensor([2.0, -1.0]), atol=0.05, rtol=0)
    alone = sample(coursed, IdentityCodec(), [7], STICKY).latents
    torch.testing.assert_close(alone[0], drawn[7])
    assert not torch.equal(noise_for([3], (2,), 1), noise_for([3], (2,), 2))
    assert torch.equal(noise_for([3, 4], (2,), 1)[1], noise_for([4], (2,), 1)[0])


@pytest.mark.parametrize("start", [1.0, 0.6])
def test_a_course_begins_with_noise_as_strong_as_there_is_at_its_first_time(start, tmp_path):
    coursed, _ = ensemble_of(FewStepSchedule.uniform(1, "renoise", start=start))
    noised, mean = start * noise_for(range(6), (2,)), torch.tensor([2.0, -1.0])
    gain = 0.25 * (1 - start) / (0.25 * (1 - start) ** 2 + start**2)
    posterior = mean + gain * (noised - (1 - start) * mean)
    torch.testing.assert_close(sample(coursed, IdentityCodec(), range(6), STICKY).latents, posterior)
    student = replace(
        Expert.load(make_expert(tmp_path / "e", 0)), few_step=FewStepSchedule.uniform(2, "renoise", start=start)
    )
    alone = sample(
        Ensemble(experts={0: student}, noise_schedule=RECTIFIED_FLOW),
        PixelCodec(image_shape=(4, 4, 1)),
        range(4),
        STICKY,
    ).latents
    unknown, noise = Condition.null(4), [noise_for(range(4), SHAPE, occasion) for occasion in range(3)]
    last = rollout_to(student, noise, unknown, student.few_step, 1)
    torch.testing.assert_close(predict_clean(student, last, torch.full((4,), start / 2), unknown), alone)
    drafted = TruncatedExpert(
        draft=student, refiner=replace(student, few_step=FewStepSchedule.uniform(1, "euler", start=0.3))
    )
    drawn = drafted.sample_draft(lambda occasion: noise[occasion - OF_DRAFT], unknown, ExpertCache(name=""))
    torch.testing.assert_close(drawn, alone)


def test_experts_that_do_not_agree_on_a_course_are_refused():
    mixture = MixtureOfGaussians((0.5, 0.5))
    experts = {k: FewStepOracle(oracle.mean, oracle.deviation) for k, oracle in mixture.experts().items()}
    experts[0].few_step = FewStepSchedule.uniform(2, "renoise")
    whole = Ensemble(experts=experts, noise_schedule=RECTIFIED_FLOW, router=mixture.router())
    with pytest.raises(EnsembleError, match=r"courses of \[0, 2\] steps"):
        sample(whole, IdentityCodec(), range(2), STICKY)


def test_a_course_cannot_be_reflected():
    coursed, _ = ensemble_of(FewStepSchedule.uniform(2, "euler"))
    with pytest.raises(ValueError, match="have a course"):
        sample(coursed, IdentityCodec(), [0], replace(STICKY, reflection=ReflectionConfig()), weak=coursed)


def drafts(folder):
    student = replace(Expert.load(folder), few_step=FewStepSchedule.uniform(2, "renoise", is_distilled=True))
    anchors = Anchors.of(torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.ones(3, 3) / 3)
    return {"student": student, "anchors": anchors, "autoregressive": Autoregressive(list(SHAPE), 2, 8, 4)}


@pytest.mark.parametrize("kind", ["student", "anchors", "autoregressive"])
def test_a_drafted_pipeline_is_saved_loaded_sampled_and_counted(kind, parts, tmp_path):
    whole = put_together(parts)
    experts = {}
    for k in whole.ensemble.experts:
        refiner = replace(
            Expert.load(make_expert(tmp_path / f"{k}", k)), few_step=FewStepSchedule.uniform(2, "euler", start=0.4)
        )
        experts[k] = TruncatedExpert(draft=drafts(make_expert(tmp_path / f"d{k}", k))[kind], refiner=refiner)
    small = replace(whole, ensemble=replace(whole.ensemble, experts=experts))
    small.save_pretrained(tmp_path / "small")
    again = DDMPipeline.from_pretrained(tmp_path / "small")
    drawn, same = small(range(4), STICKY), again(range(4), STICKY)
    assert torch.equal(drawn.latents, same.latents)
    assert torch.allclose(again([2], STICKY).latents[0], drawn.latents[2], atol=1e-6)
    for name in ("full", "top_k", "sample", "sticky_resample"):
        other = replace(STICKY, selection=SelectionConfig(name=name))
        begun = again(range(4), other)
        torch.testing.assert_close(again([3], other).latents[0], begun.latents[3], atol=1e-5, rtol=1e-4)
        assert sum(calls for part, calls in begun.calls.full_calls.items() if part.endswith("draft")) >= 4, (
            "none is left out"
        )
    counted = forward_flops(lambda: again(range(4), STICKY))
    costs, work = RowFlops.of(again), drawn.calls.full_calls
    calls = {part: sum(count for name, count in work.items() if name.endswith(part)) for part in ("draft", "refiner")}
    assert calls == {"draft": 8 if kind == "student" else 4, "refiner": 8}
    assert set(work) <= set(costs.networks)
    assert costs.times(drawn.calls) == pytest.approx(counted, rel=1e-3), "operators that really ran"


def test_drafts_are_noised_to_where_the_course_begins(tmp_path):
    expert = Expert.load(make_expert(tmp_path / "e", 0))
    anchors = Anchors.of(torch.full((1, *SHAPE), 3.0), torch.ones(3, 1))
    drafted = TruncatedExpert(
        draft=anchors, refiner=replace(expert, few_step=FewStepSchedule.uniform(1, "euler", start=0.25))
    )
    whole = Ensemble(experts={0: drafted}, noise_schedule=RECTIFIED_FLOW)
    routing = whole.init_routing(range(5), Condition.null(5), SelectionConfig(name="sticky"))
    begun = whole.initial_latents(lambda occasion: noise_for(range(5), SHAPE, occasion), Condition.null(5), routing)
    torch.testing.assert_close(begun, 0.75 * 3.0 + 0.25 * noise_for(range(5), SHAPE))
    assert OF_DRAFT > 100, "a course has fewer steps than that"


def test_a_broken_draft_is_named(tmp_path):
    write_json(tmp_path / TRUNCATED, {})
    with pytest.raises(CorruptArtifact):
        TruncatedExpert.load(tmp_path)
