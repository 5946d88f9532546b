"""Few-step schedules, and trajectories that start from a draft."""

from dataclasses import replace

import pytest
import torch

from ddm_core.artifacts import CorruptArtifact, write_json
from ensemble.compression.distillation.student import predict_clean, rollout_to
from ensemble.config import ReflectionConfig, SamplingConfig
from ensemble.ensemble import Ensemble, EnsembleError
from ensemble.evaluation.generate import RowFlops
from ensemble.multi_network_experts import DRAFT_NOISE_INDEX, TRUNCATED, TruncatedExpert
from ensemble.pipeline import EnsemblePipeline
from ensemble.sampling.sample import sample
from ensemble.solvers import make_noise
from experts.architectures.draft_generators import Anchors, Autoregressive
from experts.codec import PixelCodec
from experts.compressed.caching.feature_cache import ExpertCache
from experts.conditions.condition import Condition
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
    """An exact expert with a few-step schedule."""

    few_step: FewStepSchedule | None = None


def make_ensemble(few_step, deviation=0.5):
    expert = FewStepOracle(torch.tensor([2.0, -1.0]), deviation)
    expert.few_step = few_step
    return Ensemble(experts={0: expert}, noise_schedule=RECTIFIED_FLOW), expert


def test_noise_accepts_seeds_of_64_bits():
    for seed in (2**63, 2**64 - 1, 7):
        assert torch.equal(make_noise([seed], (2,), 3), make_noise([seed], (2,), 3))


def test_euler_few_step_ignores_the_solver():
    plain = Ensemble(experts={0: Oracle(torch.tensor([2.0, -1.0]), 0.5)}, noise_schedule=RECTIFIED_FLOW)
    ensemble, expert = make_ensemble(FewStepSchedule.uniform(3, "euler"))
    ours = sample(ensemble, IdentityCodec(), range(6), replace(STICKY, solver="heun", steps=40))
    assert expert.calls == 3 and ours.calls.evaluations == 18
    torch.testing.assert_close(ours.latents, sample(plain, IdentityCodec(), range(6), STICKY).latents)


def test_renoise_steps_converge_and_noise_is_per_sample():
    ensemble, _ = make_ensemble(FewStepSchedule.uniform(1, "renoise"))
    one_step = sample(ensemble, IdentityCodec(), range(400), STICKY).latents
    torch.testing.assert_close(one_step, torch.tensor([2.0, -1.0]).expand(400, 2), atol=1e-5, rtol=0)
    ensemble, _ = make_ensemble(FewStepSchedule.uniform(40, "renoise"))
    samples = sample(ensemble, IdentityCodec(), range(2000), STICKY).latents
    torch.testing.assert_close(samples.mean(0), torch.tensor([2.0, -1.0]), atol=0.05, rtol=0)
    alone = sample(ensemble, IdentityCodec(), [7], STICKY).latents
    torch.testing.assert_close(alone[0], samples[7])
    assert not torch.equal(make_noise([3], (2,), 1), make_noise([3], (2,), 2))
    assert torch.equal(make_noise([3, 4], (2,), 1)[1], make_noise([4], (2,), 1)[0])


@pytest.mark.parametrize("start", [1.0, 0.6])
def test_few_step_starts_with_noise_scaled_to_its_first_t(start, tmp_path):
    ensemble, _ = make_ensemble(FewStepSchedule.uniform(1, "renoise", start=start))
    noised, mean = start * make_noise(range(6), (2,)), torch.tensor([2.0, -1.0])
    gain = 0.25 * (1 - start) / (0.25 * (1 - start) ** 2 + start**2)
    posterior = mean + gain * (noised - (1 - start) * mean)
    torch.testing.assert_close(sample(ensemble, IdentityCodec(), range(6), STICKY).latents, posterior)
    student = replace(
        Expert.load(make_expert(tmp_path / "e", 0)), few_step=FewStepSchedule.uniform(2, "renoise", start=start)
    )
    alone = sample(
        Ensemble(experts={0: student}, noise_schedule=RECTIFIED_FLOW),
        PixelCodec(image_shape=(4, 4, 1)),
        range(4),
        STICKY,
    ).latents
    null, noise = Condition.null(4), [make_noise(range(4), SHAPE, index) for index in range(3)]
    last = rollout_to(student, noise, null, student.few_step, 1)
    torch.testing.assert_close(predict_clean(student, last, torch.full((4,), start / 2), null), alone)
    truncated = TruncatedExpert(
        draft=student, refiner=replace(student, few_step=FewStepSchedule.uniform(1, "euler", start=0.3))
    )
    samples = truncated.sample_draft(lambda index: noise[index - DRAFT_NOISE_INDEX], null, ExpertCache(name=""))
    torch.testing.assert_close(samples, alone)


def test_experts_of_different_few_step_schedules_raise():
    mixture = MixtureOfGaussians((0.5, 0.5))
    experts = {k: FewStepOracle(oracle.mean, oracle.deviation) for k, oracle in mixture.experts().items()}
    experts[0].few_step = FewStepSchedule.uniform(2, "renoise")
    ensemble = Ensemble(experts=experts, noise_schedule=RECTIFIED_FLOW, router=mixture.router())
    with pytest.raises(EnsembleError, match=r"schedules of \[0, 2\] steps"):
        sample(ensemble, IdentityCodec(), range(2), STICKY)


def test_reflection_of_few_step_experts_raises():
    ensemble, _ = make_ensemble(FewStepSchedule.uniform(2, "euler"))
    with pytest.raises(ValueError, match="few-step experts"):
        sample(ensemble, IdentityCodec(), [0], replace(STICKY, reflection=ReflectionConfig()), weak=ensemble)


def make_drafts(folder):
    student = replace(Expert.load(folder), few_step=FewStepSchedule.uniform(2, "renoise", is_distilled=True))
    means = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    anchors = Anchors.from_means(means, torch.ones(3, 3) / 3)
    return {"student": student, "anchors": anchors, "autoregressive": Autoregressive(list(SHAPE), 2, 8, 4)}


@pytest.mark.parametrize("kind", ["student", "anchors", "autoregressive"])
def test_truncated_pipeline_round_trip_and_flops(kind, parts, tmp_path):
    original = put_together(parts)
    experts = {}
    for k in original.ensemble.experts:
        refiner = replace(
            Expert.load(make_expert(tmp_path / f"{k}", k)), few_step=FewStepSchedule.uniform(2, "euler", start=0.4)
        )
        experts[k] = TruncatedExpert(draft=make_drafts(make_expert(tmp_path / f"d{k}", k))[kind], refiner=refiner)
    pipeline = replace(original, ensemble=replace(original.ensemble, experts=experts))
    pipeline.save_pretrained(tmp_path / "pipeline")
    again = EnsemblePipeline.from_pretrained(tmp_path / "pipeline")
    result, repeated = pipeline(range(4), STICKY), again(range(4), STICKY)
    assert torch.equal(result.latents, repeated.latents)
    assert torch.allclose(again([2], STICKY).latents[0], result.latents[2], atol=1e-6)
    for name in ("full", "top_k", "sample", "sticky_resample"):
        config = replace(STICKY, selection=SelectionConfig(name=name))
        other = again(range(4), config)
        torch.testing.assert_close(again([3], config).latents[0], other.latents[3], atol=1e-5, rtol=1e-4)
        assert sum(calls for part, calls in other.calls.full_calls.items() if part.endswith("draft")) >= 4, (
            "every sample has a draft"
        )
    counted = forward_flops(lambda: again(range(4), STICKY))
    costs, work = RowFlops.measure(again), result.calls.full_calls
    calls = {part: sum(count for name, count in work.items() if name.endswith(part)) for part in ("draft", "refiner")}
    assert calls == {"draft": 8 if kind == "student" else 4, "refiner": 8}
    assert set(work) <= set(costs.networks)
    assert costs.times(result.calls) == pytest.approx(counted, rel=1e-3), "operators that were executed"


def test_drafts_are_noised_to_the_first_t(tmp_path):
    expert = Expert.load(make_expert(tmp_path / "e", 0))
    anchors = Anchors.from_means(torch.full((1, *SHAPE), 3.0), torch.ones(3, 1))
    truncated = TruncatedExpert(
        draft=anchors, refiner=replace(expert, few_step=FewStepSchedule.uniform(1, "euler", start=0.25))
    )
    ensemble = Ensemble(experts={0: truncated}, noise_schedule=RECTIFIED_FLOW)
    routing = ensemble.init_routing(range(5), Condition.null(5), SelectionConfig(name="sticky"))
    latents = ensemble.initial_latents(lambda index: make_noise(range(5), SHAPE, index), Condition.null(5), routing)
    torch.testing.assert_close(latents, 0.75 * 3.0 + 0.25 * make_noise(range(5), SHAPE))
    assert DRAFT_NOISE_INDEX > 100, "few-step schedules are shorter"


def test_broken_draft_raises(tmp_path):
    write_json(tmp_path / TRUNCATED, {})
    with pytest.raises(CorruptArtifact):
        TruncatedExpert.load(tmp_path)
