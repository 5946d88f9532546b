import pytest
import torch

from ensemble.ensemble import Ensemble
from ensemble.sampling.guidance import guided_velocity
from experts.condition import Condition
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from router.config import SelectionConfig
from tests.oracles import MixtureOfGaussians

MIXTURE = MixtureOfGaussians((0.5, 0.3, 0.2), allowed=((0,), (1, 2)))
ROWS = 6
CONDITION = Condition(torch.tensor([0, 1] * 3))
NOISED = torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.full((ROWS,), 0.7, dtype=torch.float64)


def ensemble() -> Ensemble:
    return Ensemble(experts=MIXTURE.experts(), noise_schedule=RECTIFIED_FLOW, router=MIXTURE.router())


def test_each_branch_has_gates_of_its_own() -> None:
    """Here experts ignore the condition, so guidance acts through the router alone."""
    whole, selection = ensemble(), SelectionConfig(name="full")
    conditional = whole.velocity(NOISED, T, CONDITION, whole.init_routing(range(ROWS), CONDITION, selection))
    null = Condition.null(ROWS)
    unconditional = whole.velocity(NOISED, T, null, whole.init_routing(range(ROWS), null, selection))
    assert not torch.allclose(conditional, unconditional)
    field = guided_velocity(whole, CONDITION, whole.init_routing(range(ROWS), CONDITION, selection), 2.5)
    torch.testing.assert_close(field(NOISED, T), unconditional + 2.5 * (conditional - unconditional))


@pytest.mark.parametrize("name", ["full", "sticky"])
def test_both_branches_reach_an_expert_in_one_call(name: str) -> None:
    whole = ensemble()
    routing = whole.init_routing(range(ROWS), CONDITION, SelectionConfig(name=name))
    guided_velocity(whole, CONDITION, routing, 2.0)(NOISED, T)
    assert all(expert.calls <= 1 for expert in whole.experts.values())
    assert sum(routing.calls.experts.values()) == sum(expert.rows for expert in whole.experts.values())


def test_sticky_asks_the_same_expert_in_both_branches() -> None:
    whole = ensemble()
    routing = whole.init_routing(range(ROWS), CONDITION, SelectionConfig(name="sticky"))
    guided_velocity(whole, CONDITION, routing, 2.0)(NOISED, T)
    for expert in whole.experts.values():
        assert expert.null_rows * 2 == expert.rows
    assert sum(routing.calls.experts.values()) == 2 * ROWS


def test_guidance_of_the_null_condition_changes_nothing() -> None:
    whole, null = ensemble(), Condition.null(ROWS)
    routing = whole.init_routing(range(ROWS), null, SelectionConfig(name="sample"))
    plain, strong = guided_velocity(whole, null, routing, 1.0), guided_velocity(whole, null, routing, 7.0)
    torch.testing.assert_close(strong(NOISED, T), plain(NOISED, T), atol=1e-12, rtol=0)
