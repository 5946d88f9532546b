"""Network calls per image: the formulas against the counts of an ensemble."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.sampling.guidance import guided_velocity
from ensemble.solvers import SOLVERS, make_noise, uniform_times
from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import NOISE_SCHEDULES
from experts.expert_model import ExpertModel
from orchestrator.planning.sampling_calls import CallsPerImage, calls_per_image, most_expensive
from router.config import SelectionConfig

SELECTIONS = [
    SelectionConfig(name="full"),
    SelectionConfig(name="sticky"),
    SelectionConfig(name="top_k", k=2),
    SelectionConfig(name="top_k", k=9),
    SelectionConfig(name="sample", draws=1),
    SelectionConfig(name="sample", draws=3),
    SelectionConfig(name="threshold", probability=0.3),
    SelectionConfig(name="nucleus", total=0.9),
    SelectionConfig(name="full_then_top1", t_switch=0.5),
    SelectionConfig(name="full_then_top1", t_switch=0.31),
    SelectionConfig(name="threshold_then_top1", probability=0.3, t_switch=0.31),
    SelectionConfig(name="full_then_sticky", t_switch=0.5),
    SelectionConfig(name="full_then_sticky", t_switch=0.31),
    SelectionConfig(name="full_then_sticky", t_switch=0.0),
    SelectionConfig(name="sticky_resample", t_switch=0.5),
    SelectionConfig(name="sticky_resample", t_switch=0.0),
    SelectionConfig(name="coupled_resample"),
]


class ZeroVelocityExpert(ExpertModel):
    """An expert whose velocity is zero."""

    def velocity(self, noised, t, condition, noise_schedule):
        return torch.zeros_like(noised)

    def to(self, device):
        return self

    def save(self, folder):
        raise NotImplementedError


class SampleDependentRouter:
    """A router whose logits depend on the sample."""

    num_experts = 4

    def logits(self, noised, t, condition):
        return noised.flatten(1)[:, :4] * 3

    def prior_logits(self, condition, present=None):
        return torch.zeros(len(condition), 4)

    def to(self, device):
        return self

    def save(self, folder):
        raise NotImplementedError


CASES = [
    *((selection, solver, 1.0) for selection in SELECTIONS for solver in ("euler", "heun")),
    *((SELECTIONS[0], solver, 2.0) for solver in SOLVERS),
    (SELECTIONS[1], "heun", 2.0),
    *((selection, "heun", 2.0) for selection in SELECTIONS[-8:]),
]


@pytest.mark.parametrize(("selection", "solver", "scale"), CASES)
def test_formula_equals_the_counts_of_an_ensemble(selection, solver, scale):
    ensemble = Ensemble(
        experts={k: ZeroVelocityExpert() for k in range(4)},
        noise_schedule=NOISE_SCHEDULES["rectified_flow"],
        router=SampleDependentRouter(),
    )
    config = SamplingConfig(solver=solver, steps=8, selection=selection, guidance_scale=scale)
    condition, images = Condition(torch.zeros(16, dtype=torch.int64)), 16
    routing = ensemble.init_routing(range(images), condition, selection)
    field = guided_velocity(ensemble, condition, routing, scale)
    SOLVERS[solver](field, make_noise(range(images), (8,)), uniform_times(8))
    expected = calls_per_image(config, 4, has_router=True, is_conditional=True)
    assert routing.calls.router == images * expected.router
    if expected.is_upper_bound:
        assert images * 8 <= routing.calls.experts.total() <= images * expected.expert
    else:
        assert routing.calls.experts.total() == images * expected.expert


@given(st.sampled_from(SELECTIONS), st.integers(1, 40))
def test_monolith_is_called_once_per_velocity(selection, steps):
    config = SamplingConfig(solver="heun", steps=steps, selection=selection)
    calls = calls_per_image(config, 1, has_router=False, is_conditional=True)
    assert (calls.expert, calls.router, calls.is_upper_bound) == (2 * steps - 1, 0, False)


def test_guidance_without_condition_adds_no_calls():
    config = SamplingConfig(guidance_scale=3.0, steps=5, solver="euler")
    assert calls_per_image(config, 4, has_router=True, is_conditional=False).expert == 5


def test_selection_search_is_bounded_by_its_limit():
    sticky, threshold, full = (
        CallsPerImage(expert=expert, router=router, is_upper_bound=is_bound)
        for expert, router, is_bound in ((20, 0, False), (100, 20, True), (160, 20, False))
    )
    assert most_expensive([sticky, threshold, full], 1.25) == CallsPerImage(expert=25, router=20, is_upper_bound=True)
    assert most_expensive([sticky], 8.0) == sticky
