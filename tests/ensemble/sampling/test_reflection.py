"""Weak-to-strong reflection: first-order effect, cost, refusals."""

import shutil
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ddm_core.artifacts import Workspace
from ensemble.compression.measurement import model_bytes
from ensemble.config import ReflectionConfig, SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.evaluation.generate import RowFlops, generate
from ensemble.membership import remove_experts
from ensemble.pipeline import EnsemblePipeline, assemble
from ensemble.pipeline_folder import PipelineError
from ensemble.sampling.guidance import reflected_solver, reflection_step
from ensemble.sampling.images import to_bytes
from ensemble.sampling.sample import sample
from ensemble.solvers import SOLVERS, VelocityField, uniform_times
from experts.diffusion.noise_schedule import COSINE, RECTIFIED_FLOW
from router.config import SelectionConfig
from tests.ensemble.test_pipeline import make_expert, parts, put_together
from tests.oracles import IdentityCodec, MixtureOfGaussians, gaussian_velocity

__all__ = ["parts"]
MIXTURE = MixtureOfGaussians((0.5, 0.3, 0.2))
NOISED = torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gaussian(mean: float, deviation: float) -> VelocityField:
    return lambda noised, t: gaussian_velocity(noised, t, torch.full((2,), mean).double(), deviation, COSINE)


def curved(noised: Tensor, t: Tensor) -> Tensor:
    return torch.sin(2 * noised) + t[:, None] ** 2


STRONG, WEAK = gaussian(1.0, 0.5), gaussian(0.3, 0.8)


@pytest.mark.parametrize("field", [STRONG, curved])
def test_reflection_of_equal_fields_has_second_order_error(field):
    errors = [
        (reflection_step(field, field, NOISED, 0.6, 0.6 - h) - NOISED).abs().max().item() for h in (0.04, 0.02, 0.01)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_reflection_step_follows_the_velocity_difference():
    t = torch.full((40,), 0.6, dtype=torch.float64)
    difference = STRONG(NOISED, t) - WEAK(NOISED, t)
    remainders = [
        (reflection_step(STRONG, WEAK, NOISED, 0.6, 0.6 - h) - NOISED) / -h - difference for h in (0.02, 0.01, 0.005)
    ]
    sizes = [remainder.abs().max().item() for remainder in remainders]
    assert sizes[0] / sizes[1] == pytest.approx(2, rel=0.1) == pytest.approx(sizes[1] / sizes[2], rel=0.1)
    assert sizes[2] < 0.05 * difference.abs().max()


def test_reflection_of_linear_velocities_has_closed_form():
    def linear(slope: float, offset: float) -> VelocityField:
        return lambda noised, t: slope * noised + offset

    (a, b), (c, d), h = (0.7, -0.2), (0.3, 0.5), 0.1
    ahead = NOISED - h * (a * NOISED + b)
    expected = ahead + h * (c * ahead + d)
    torch.testing.assert_close(reflection_step(linear(a, b), linear(c, d), NOISED, 0.5, 0.4), expected)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_reflected_solver_of_equal_fields_converges(solver):
    exact = SOLVERS["heun"](STRONG, NOISED, uniform_times(2000))
    errors = []
    for steps in (20, 40, 80):
        times = uniform_times(steps)
        errors.append(
            (reflected_solver(solver, STRONG, STRONG, steps)(STRONG, NOISED, times) - exact).abs().max().item()
        )
    assert errors[0] / errors[1] > 1.6 and errors[1] / errors[2] > 1.6


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize(("requested", "reflected"), [(1, 1), (3, 3), (4, 4), (99, 4)])
def test_reflected_solver_skips_the_last_step(solver, requested, reflected):
    times: list[float] = []

    def weak(noised: Tensor, t: Tensor) -> Tensor:
        times.append(t[0].item())
        return STRONG(noised, t)

    reflected_solver(solver, STRONG, weak, requested)(STRONG, NOISED, uniform_times(5))
    assert times == pytest.approx([0.8, 0.6, 0.4, 0.2][:reflected])


def sample_reflected(solver: str, reflection: ReflectionConfig | None, weak: Ensemble | None):
    ensemble = Ensemble(experts=MIXTURE.experts(), noise_schedule=RECTIFIED_FLOW, router=MIXTURE.router())
    config = SamplingConfig(solver=solver, steps=10, reflection=reflection)
    return sample(ensemble, IdentityCodec(), range(6), config, weak=weak)


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 10), ("heun", 19)])
def test_reflection_counts_calls_of_both_ensembles(solver, evaluations):
    weak = Ensemble(experts={0: MIXTURE.experts()[0]}, noise_schedule=RECTIFIED_FLOW)
    result = sample_reflected(solver, ReflectionConfig(steps=4), weak)
    assert result.calls.experts.total() == 6 * (evaluations + 4)
    assert result.calls.weak.experts == {0: 6 * 4} and result.calls.evaluations == 6 * evaluations
    assert result.calls_per_step == pytest.approx((evaluations + 4 + 4) / evaluations)
    assert not torch.equal(result.latents, sample_reflected(solver, None, None).latents)


def test_reflection_moves_samples_to_the_missing_component():
    """The weak ensemble lacks component 0, so reflection moves more samples to it."""
    experts = {k: expert for k, expert in MIXTURE.experts().items() if k}
    weak = Ensemble(experts=experts, noise_schedule=RECTIFIED_FLOW, router=MIXTURE.router())
    ensemble = Ensemble(experts=MIXTURE.experts(), noise_schedule=RECTIFIED_FLOW, router=MIXTURE.router())
    config = SamplingConfig(steps=20, selection=SelectionConfig(name="full"), batch_size=1000)
    plain = sample(ensemble, IdentityCodec(), range(1000), config)
    config = SamplingConfig(
        steps=20, selection=SelectionConfig(name="full"), reflection=ReflectionConfig(steps=8), batch_size=1000
    )
    reflected_samples = sample(ensemble, IdentityCodec(), range(1000), config, weak=weak)
    assert MIXTURE.nearest(reflected_samples.latents)[0] > MIXTURE.nearest(plain.latents)[0] + 50


def mixture(share: float) -> Ensemble:
    """Two exact components in full selection, the first with this share."""
    model = MixtureOfGaussians((share, 1 - share))
    return Ensemble(experts=model.experts(), noise_schedule=RECTIFIED_FLOW, router=model.router())


def share_of_first(strong: Ensemble, weak: Ensemble | None, steps: int, reflected: int | None = None) -> float:
    config = SamplingConfig(
        solver="euler",
        steps=steps,
        selection=SelectionConfig(name="full"),
        batch_size=4000,
        reflection=None if weak is None else ReflectionConfig(steps=reflected),
    )
    samples = sample(strong, IdentityCodec(), range(4000), config, weak=weak)
    return MixtureOfGaussians((0.5, 0.5)).nearest(samples.latents)[0] / 4000


@pytest.mark.parametrize("steps", [20, 40, 80])
def test_reflection_of_all_steps_reaches_the_true_shares(steps):
    """W2SD, section 3: the gap from weak to strong stands for that from strong to real.

    The true share is .50. The strong ensemble has .35, with log odds of -.62; the weak one .225, with twice those.
    """
    strong, weak = mixture(0.35), mixture(0.225)
    reached = share_of_first(strong, weak, steps)
    assert reached == pytest.approx(0.5, abs=0.03)
    assert share_of_first(strong, weak, steps, reflected=5) < reached
    assert share_of_first(strong, strong, steps) == pytest.approx(share_of_first(strong, None, steps), abs=0.02)
    assert share_of_first(weak, strong, steps) < 0.225 - 0.1


def test_reflection_and_weak_ensemble_must_be_given_together():
    weak = Ensemble(experts={0: MIXTURE.experts()[0]}, noise_schedule=RECTIFIED_FLOW)
    for reflection, weak_ensemble in ((ReflectionConfig(), None), (None, weak)):
        with pytest.raises(ValueError, match="weak ensemble"):
            sample_reflected("euler", reflection, weak_ensemble)


@pytest.mark.parametrize("settings", [{"weak": "folder"}, {"path": "somewhere"}])
def test_reflection_path_without_folder_raises(settings):
    with pytest.raises(ValidationError, match=r"reflection\.path"):
        ReflectionConfig(**settings)


def test_reflection_with_stateful_scheduler_raises():
    with pytest.raises(ValidationError, match="euler or heun, not flow_match_heun"):
        SamplingConfig(solver="flow_match_heun", reflection=ReflectionConfig())


class TestPipelineReflection:
    REFLECTED = ReflectionConfig(weak="expert", expert_id=1, steps=2)
    CONFIG = SamplingConfig(steps=3, selection=SelectionConfig(name="full"), reflection=REFLECTED)

    def test_weak_expert_equals_its_folder(self, parts):
        pipeline = put_together(parts)
        folder = ReflectionConfig(weak="folder", path=str(parts / "trained_1"), steps=2)
        inside, outside = (
            pipeline([1, 2], replace(self.CONFIG, reflection=reflection)) for reflection in (self.REFLECTED, folder)
        )
        assert torch.equal(inside.latents, outside.latents) and inside.calls == outside.calls
        assert not torch.equal(inside.latents, pipeline([1, 2], replace(self.CONFIG, reflection=None)).latents)

    def test_weak_ensemble_with_fewer_experts(self, parts):
        pipeline = put_together(parts)
        remove_experts(pipeline, [0, 2]).save_pretrained(parts / "fewer")
        folder = ReflectionConfig(weak="folder", path=str(parts / "fewer"), steps=2)
        result = pipeline([1, 2], replace(self.CONFIG, reflection=folder))
        assert set(result.calls.weak.experts) == {1} and result.calls.weak.router == 4

    def test_weak_expert_that_is_missing_raises(self, parts):
        config = replace(self.CONFIG, reflection=ReflectionConfig(weak="expert", expert_id=7))
        with pytest.raises(PipelineError, match=r"one of \[0, 1, 2\].*got 7"):
            put_together(parts)([1], config)

    def test_early_checkpoints_reflect_each_sample_s_own_expert(self, parts):
        config = replace(self.CONFIG, selection=SelectionConfig(), reflection=ReflectionConfig())
        with pytest.raises(PipelineError, match=r"experts \[0, 1, 2\].*early_checkpoint=0\.5"):
            put_together(parts)([1], config)
        for k in range(3):
            make_expert(parts / f"trained_{k}" / "early", 10 + k)
        pipeline = put_together(parts)
        result = pipeline(range(12), config)
        assert result.calls.weak.experts.keys() == result.calls.experts.keys() and len(result.calls.experts) == 3
        again = EnsemblePipeline.from_pretrained(parts / "pipeline")(range(12), config)
        assert torch.equal(again.latents, result.latents)
        size = model_bytes(parts / "pipeline")
        shutil.rmtree(parts / "pipeline" / "expert_0" / "early")
        assert model_bytes(parts / "pipeline") == size

    def test_monolith_of_no_run_is_refused(self, parts):
        config = replace(self.CONFIG, reflection=ReflectionConfig(weak="monolith"))
        with pytest.raises(PipelineError, match="set weak=folder"):
            put_together(parts)([1], config)

    def test_weak_ensemble_of_other_classes_raises(self, parts):
        other = make_expert(parts / "other", 0, num_classes=5)
        assemble({0: other}, None, parts / "codec", parts / "alone")
        for folder in ("other", "alone"):
            reflection = ReflectionConfig(weak="folder", path=str(parts / folder))
            with pytest.raises(PipelineError, match="5 classes|reflection needs two pipelines with the same"):
                put_together(parts)([1], replace(self.CONFIG, reflection=reflection))

    def test_generated_reflection_matches_pipeline_and_counts_weak(self, parts, tmp_path):
        put_together(parts)
        config = replace(self.CONFIG, batch_size=2)
        first, again = (
            generate(parts / "pipeline", range(5), None, config, Workspace.at(tmp_path / name)) for name in ("a", "a")
        )
        plain = generate(
            parts / "pipeline", range(5), None, replace(config, reflection=None), Workspace.at(tmp_path / "b")
        )
        costs = RowFlops.measure(EnsemblePipeline.from_pretrained(parts / "pipeline"))
        assert first.calls == again.calls and first.flops == again.flops > plain.flops
        assert first.flops == pytest.approx(costs.times(first.calls) + 5 * 2 * costs.experts[1])
        assert first.calls.weak.experts == {0: 5 * 2} and plain.calls.weak is None
        direct = EnsemblePipeline.from_pretrained(parts / "pipeline")(range(5), config)
        assert (first.images == to_bytes(direct.images)).all() and (again.images == first.images).all()
        ours, theirs = (run.calls.experts.total() + run.calls.weak.experts.total() for run in (first, direct))
        assert ours == theirs
