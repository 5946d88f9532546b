"""Weak-to-strong reflection: its first order, its cost, and what it leaves alone."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ddm_core.artifacts import Workspace
from ensemble.config import ReflectionConfig, SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.evaluation.generate import RowFlops, generate
from ensemble.membership import without_experts
from ensemble.pipeline import DDMPipeline, PipelineError, assemble
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
def test_equal_fields_come_back_but_for_the_second_order(field):
    errors = [
        (reflection_step(field, field, NOISED, 0.6, 0.6 - h) - NOISED).abs().max().item() for h in (0.04, 0.02, 0.01)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_to_first_order_the_change_is_the_step_times_the_difference_of_the_velocities():
    t = torch.full((40,), 0.6, dtype=torch.float64)
    difference = STRONG(NOISED, t) - WEAK(NOISED, t)
    rests = [
        (reflection_step(STRONG, WEAK, NOISED, 0.6, 0.6 - h) - NOISED) / -h - difference for h in (0.02, 0.01, 0.005)
    ]
    sizes = [rest.abs().max().item() for rest in rests]
    assert sizes[0] / sizes[1] == pytest.approx(2, rel=0.1) == pytest.approx(sizes[1] / sizes[2], rel=0.1)
    assert sizes[2] < 0.05 * difference.abs().max()


def test_linear_velocities_in_closed_form():
    def linear(slope: float, offset: float) -> VelocityField:
        return lambda noised, t: slope * noised + offset

    (a, b), (c, d), h = (0.7, -0.2), (0.3, 0.5), 0.1
    ahead = NOISED - h * (a * NOISED + b)
    expected = ahead + h * (c * ahead + d)
    torch.testing.assert_close(reflection_step(linear(a, b), linear(c, d), NOISED, 0.5, 0.4), expected)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_whole_trajectory_against_itself_converges_to_the_plain_one(solver):
    exact = SOLVERS["heun"](STRONG, NOISED, uniform_times(2000))
    errors = []
    for steps in (20, 40, 80):
        times = uniform_times(steps)
        errors.append(
            (reflected_solver(solver, STRONG, STRONG, steps)(STRONG, NOISED, times) - exact).abs().max().item()
        )
    assert errors[0] / errors[1] > 1.6 and errors[1] / errors[2] > 1.6


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize(("asked", "reflected"), [(1, 1), (3, 3), (4, 4), (99, 4)])
def test_so_many_first_steps_are_reflected_and_never_the_last(solver, asked, reflected):
    seen: list[float] = []

    def weak(noised: Tensor, t: Tensor) -> Tensor:
        seen.append(t[0].item())
        return STRONG(noised, t)

    reflected_solver(solver, STRONG, weak, asked)(STRONG, NOISED, uniform_times(5))
    assert seen == pytest.approx([0.8, 0.6, 0.4, 0.2][:reflected])


def drawn(solver: str, reflection: ReflectionConfig | None, weak: Ensemble | None):
    ensemble = Ensemble(experts=MIXTURE.experts(), noise_schedule=RECTIFIED_FLOW, router=MIXTURE.router())
    config = SamplingConfig(solver=solver, steps=10, reflection=reflection)
    return sample(ensemble, IdentityCodec(), range(6), config, weak=weak)


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 10), ("heun", 19)])
def test_both_sides_calls_are_counted_on_top(solver, evaluations):
    weak = Ensemble(experts={0: MIXTURE.experts()[0]}, noise_schedule=RECTIFIED_FLOW)
    found = drawn(solver, ReflectionConfig(steps=4), weak)
    assert found.calls.experts.total() == 6 * (evaluations + 4)
    assert found.calls.weak.experts == {0: 6 * 4} and found.calls.evaluations == 6 * evaluations
    assert found.calls_per_step == pytest.approx((evaluations + 4 + 4) / evaluations)
    assert not torch.equal(found.latents, drawn(solver, None, None).latents)


def test_against_a_weaker_ensemble_samples_move_away_from_what_it_lacks():
    """Without component 0 the weak velocity leads elsewhere, so reflection leads more samples to component 0."""
    experts = {k: expert for k, expert in MIXTURE.experts().items() if k}
    weak = Ensemble(experts=experts, noise_schedule=RECTIFIED_FLOW, router=MIXTURE.router())
    ensemble = Ensemble(experts=MIXTURE.experts(), noise_schedule=RECTIFIED_FLOW, router=MIXTURE.router())
    config = SamplingConfig(steps=20, selection=SelectionConfig(name="full"), batch_size=1000)
    plain = sample(ensemble, IdentityCodec(), range(1000), config)
    config = SamplingConfig(
        steps=20, selection=SelectionConfig(name="full"), reflection=ReflectionConfig(steps=8), batch_size=1000
    )
    moved = sample(ensemble, IdentityCodec(), range(1000), config, weak=weak)
    assert MIXTURE.nearest(moved.latents)[0] > MIXTURE.nearest(plain.latents)[0] + 50


def test_a_reflection_needs_its_weak_side_and_a_weak_side_needs_a_reflection():
    weak = Ensemble(experts={0: MIXTURE.experts()[0]}, noise_schedule=RECTIFIED_FLOW)
    for reflection, given in ((ReflectionConfig(), None), (None, weak)):
        with pytest.raises(ValueError, match="weak ensemble"):
            drawn("euler", reflection, given)


@pytest.mark.parametrize("chosen", [{"weak": "folder"}, {"path": "somewhere"}])
def test_a_weak_folder_needs_a_path_and_nothing_else_does(chosen):
    with pytest.raises(ValidationError, match=r"reflection\.path"):
        ReflectionConfig(**chosen)


def test_schedulers_with_a_memory_are_refused():
    with pytest.raises(ValidationError, match="euler or heun, not flow_match_heun"):
        SamplingConfig(solver="flow_match_heun", reflection=ReflectionConfig())


class TestThroughAPipeline:
    REFLECTED = ReflectionConfig(expert_id=1, steps=2)
    CONFIG = SamplingConfig(steps=3, selection=SelectionConfig(name="full"), reflection=REFLECTED)

    def test_an_expert_or_its_folder_are_the_same_weak_side(self, parts):
        pipeline = put_together(parts)
        folder = ReflectionConfig(weak="folder", path=str(parts / "trained_1"), steps=2)
        inside, outside = (
            pipeline([1, 2], replace(self.CONFIG, reflection=reflection)) for reflection in (self.REFLECTED, folder)
        )
        assert torch.equal(inside.latents, outside.latents) and inside.calls == outside.calls
        assert not torch.equal(inside.latents, pipeline([1, 2], replace(self.CONFIG, reflection=None)).latents)

    def test_the_weak_side_may_be_an_ensemble_with_fewer_experts(self, parts):
        pipeline = put_together(parts)
        without_experts(pipeline, [0, 2]).save_pretrained(parts / "fewer")
        folder = ReflectionConfig(weak="folder", path=str(parts / "fewer"), steps=2)
        found = pipeline([1, 2], replace(self.CONFIG, reflection=folder))
        assert set(found.calls.weak.experts) == {1} and found.calls.weak.router == 4

    def test_a_weak_expert_that_is_not_there_is_refused(self, parts):
        config = replace(self.CONFIG, reflection=ReflectionConfig(expert_id=7))
        with pytest.raises(PipelineError, match=r"one of \[0, 1, 2\].*got 7"):
            put_together(parts)([1], config)

    def test_a_weak_ensemble_of_other_classes_is_refused(self, parts):
        other = make_expert(parts / "other", 0, num_classes=5)
        assemble({0: other}, None, parts / "codec", parts / "alone")
        for folder in ("other", "alone"):
            reflection = ReflectionConfig(weak="folder", path=str(parts / folder))
            with pytest.raises(PipelineError, match="5 classes|reflection needs the same"):
                put_together(parts)([1], replace(self.CONFIG, reflection=reflection))

    def test_drawn_in_batches_images_and_costs_are_the_same_and_the_weak_side_is_paid_for(self, parts, tmp_path):
        put_together(parts)
        config = replace(self.CONFIG, batch_size=2)
        first, again = (
            generate(parts / "pipeline", range(5), None, config, Workspace.at(tmp_path / name)) for name in ("a", "a")
        )
        plain = generate(
            parts / "pipeline", range(5), None, replace(config, reflection=None), Workspace.at(tmp_path / "b")
        )
        costs = RowFlops.of(DDMPipeline.from_pretrained(parts / "pipeline"))
        assert first.calls == again.calls and first.flops == again.flops > plain.flops
        assert first.flops == pytest.approx(costs.times(first.calls) + 5 * 2 * costs.experts[1])
        assert first.calls.weak.experts == {0: 5 * 2} and plain.calls.weak is None
        whole = DDMPipeline.from_pretrained(parts / "pipeline")(range(5), config)
        assert (first.images == to_bytes(whole.images)).all() and (again.images == first.images).all()
        ours, theirs = (one.calls.experts.total() + one.calls.weak.experts.total() for one in (first, whole))
        assert ours == theirs
