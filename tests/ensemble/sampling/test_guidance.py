import pytest
import torch

from ensemble.ensemble import Ensemble
from ensemble.sampling.guidance import guided_velocity
from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from router.config import SelectionConfig
from tests.oracles import MixtureOfGaussians

MIXTURE = MixtureOfGaussians((0.5, 0.3, 0.2), allowed=((0,), (1, 2)))
ROWS = 6
CONDITION = Condition(torch.tensor([0, 1] * 3))
NOISED = torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.full((ROWS,), 0.7, dtype=torch.float64)


def make_ensemble() -> Ensemble:
    return Ensemble(experts=MIXTURE.experts(), noise_schedule=RECTIFIED_FLOW, router=MIXTURE.router())


def test_guided_velocity_has_separate_gates_per_branch() -> None:
    """The experts ignore the condition, so guidance acts through the router alone."""
    model, selection = make_ensemble(), SelectionConfig(name="full")
    conditional = model.velocity(NOISED, T, CONDITION, model.init_routing(range(ROWS), CONDITION, selection))
    null = Condition.null(ROWS)
    unconditional = model.velocity(NOISED, T, null, model.init_routing(range(ROWS), null, selection))
    assert not torch.allclose(conditional, unconditional)
    field = guided_velocity(model, CONDITION, model.init_routing(range(ROWS), CONDITION, selection), 2.5)
    torch.testing.assert_close(field(NOISED, T), unconditional + 2.5 * (conditional - unconditional))


@pytest.mark.parametrize("name", ["full", "sticky"])
def test_guided_velocity_calls_each_expert_once(name: str) -> None:
    model = make_ensemble()
    routing = model.init_routing(range(ROWS), CONDITION, SelectionConfig(name=name))
    guided_velocity(model, CONDITION, routing, 2.0)(NOISED, T)
    assert all(expert.calls <= 1 for expert in model.experts.values())
    assert sum(routing.calls.experts.values()) == sum(expert.rows for expert in model.experts.values())


def test_sticky_uses_one_expert_in_both_branches() -> None:
    model = make_ensemble()
    routing = model.init_routing(range(ROWS), CONDITION, SelectionConfig(name="sticky"))
    guided_velocity(model, CONDITION, routing, 2.0)(NOISED, T)
    for expert in model.experts.values():
        assert expert.null_rows * 2 == expert.rows
    assert sum(routing.calls.experts.values()) == 2 * ROWS


def test_guidance_of_the_null_condition_changes_nothing() -> None:
    model, null = make_ensemble(), Condition.null(ROWS)
    routing = model.init_routing(range(ROWS), null, SelectionConfig(name="sample"))
    plain, strong = guided_velocity(model, null, routing, 1.0), guided_velocity(model, null, routing, 7.0)
    torch.testing.assert_close(strong(NOISED, T), plain(NOISED, T), atol=1e-12, rtol=0)
