"""What a trajectory remembers: which expert was drawn, when it may change, and that nobody else's rows matter."""

import pytest
import torch
from torch import Tensor

from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.sampling.guidance import guided_velocity
from ensemble.sampling.sample import sample
from ensemble.solvers import SOLVERS, uniform_times
from experts.condition import Condition
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from router.config import SelectionConfig
from router.selection import SELECTIONS
from tests.oracles import IdentityCodec, MixtureOfGaussians

MIXTURE = MixtureOfGaussians((0.4, 0.3, 0.2, 0.1), radius=0.8, allowed=((0, 1, 2), (1, 2, 3)))
SEEDS = [3, 1000, 17, 2**35, 4, 8, 9, 10]
NULL = Condition.null(len(SEEDS))
REMEMBERING = ["sticky", "full_then_sticky", "sticky_resample", "coupled_resample"]


def whole() -> Ensemble:
    return Ensemble(experts=MIXTURE.experts(), noise_schedule=RECTIFIED_FLOW, router=MIXTURE.router())


def noise(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gates_along(selection: SelectionConfig, seeds: list[int], solver: str = "heun", steps: int = 8) -> Tensor:
    """The gates of every evaluation of a trajectory."""
    ensemble, null = whole(), Condition.null(len(seeds))
    routing = ensemble.init_routing(seeds, null, selection)
    seen = []

    def velocity(noised: Tensor, t: Tensor) -> Tensor:
        found = ensemble.velocity(noised, t, null, routing)
        seen.append(routing.memory.gates.double())
        return found

    start = torch.cat([noise(1, seed % 2**20) for seed in seeds])
    SOLVERS[solver](velocity, start, uniform_times(steps))
    return torch.stack(seen)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("name", list(SELECTIONS))
def test_gates_are_the_same_alone_and_in_a_batch(name: str, solver: str) -> None:
    selection = SelectionConfig(name=name)
    together = gates_along(selection, SEEDS, solver, 5)
    for row in (0, 3, 7):
        torch.testing.assert_close(gates_along(selection, [SEEDS[row]], solver, 5), together[:, row : row + 1])
    backwards = gates_along(selection, SEEDS[::-1], solver, 5)
    torch.testing.assert_close(backwards.flip(1), together)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_sticky_at_mixes_above_and_keeps_one_draw_below(solver: str) -> None:
    gates = gates_along(SelectionConfig(name="full_then_sticky", t_switch=0.5), SEEDS, solver)
    spoken = (gates > 0).sum(-1)
    first = next(number for number, row in enumerate(spoken) if (row == 1).all())
    assert first == (4 if solver == "euler" else 7)  # Heun looks ahead from 5/8 to 4/8
    assert (spoken[:first] > 1).all()
    assert (gates[first:] == gates[first]).all()


def test_sticky_at_one_is_a_draw_from_the_posterior_at_one() -> None:
    selection, seeds = SelectionConfig(name="full_then_sticky", t_switch=1.0), list(range(4000))
    gates = gates_along(selection, seeds, steps=3)
    assert (gates == gates[0]).all()
    torch.testing.assert_close(gates[0].mean(0), torch.tensor(MIXTURE.shares).double(), atol=0.03, rtol=0)


def test_sticky_at_zero_is_full() -> None:
    never, full = SelectionConfig(name="full_then_sticky", t_switch=0.0), SelectionConfig(name="full")
    assert torch.equal(gates_along(never, SEEDS), gates_along(full, SEEDS))


def test_redraw_at_zero_is_sticky_and_changes_once_otherwise() -> None:
    never, sticky = SelectionConfig(name="sticky_resample", t_switch=0.0), SelectionConfig(name="sticky")
    assert torch.equal(gates_along(never, SEEDS), gates_along(sticky, SEEDS))
    seeds = list(range(300))
    gates = gates_along(SelectionConfig(name="sticky_resample", t_switch=0.8), seeds)
    changes = (gates[1:] != gates[:-1]).any(-1)
    assert changes.any(1).sum() == 1
    assert 150 < changes.sum() < 260


def test_what_is_settled_stays_when_t_rises_again() -> None:
    ensemble = whole()
    for name in ("full_then_sticky", "sticky_resample"):
        routing = ensemble.init_routing(SEEDS, NULL, SelectionConfig(name=name))
        low, high = torch.full((8,), 0.3, dtype=torch.float64), torch.full((8,), 0.9, dtype=torch.float64)
        settled = ensemble.gates(noise(8), low, NULL, routing)
        assert torch.equal(ensemble.gates(noise(8, 1), high, NULL, routing), settled)
        assert torch.equal(ensemble.gates(noise(8, 2), low, NULL, routing), settled)


def test_rows_settle_one_by_one() -> None:
    ensemble = whole()
    routing = ensemble.init_routing(SEEDS, NULL, SelectionConfig(name="full_then_sticky"))
    high = torch.full((8,), 0.9, dtype=torch.float64)
    mixed = torch.where(torch.arange(8) % 2 == 0, 0.3, high)
    first = ensemble.gates(noise(8), mixed, NULL, routing)
    assert ((first > 0).sum(1) == torch.tensor([1, 4] * 4)).all()
    for number in (1, 2):
        later = ensemble.gates(noise(8, number), high, NULL, routing)
        assert torch.equal(later[::2], first[::2])
        assert not torch.equal(later[1::2], first[1::2])


@pytest.mark.parametrize(
    ("name", "asked"), [("sticky", 0), ("sticky_resample", 1), ("full_then_sticky", 6), ("coupled_resample", 9)]
)
def test_the_router_is_asked_no_more_than_it_must(name: str, asked: int) -> None:
    ensemble = whole()
    config = SamplingConfig(solver="heun", steps=5, selection=SelectionConfig(name=name, t_switch=0.5))
    assert sample(ensemble, IdentityCodec(), SEEDS, config).calls.router == asked * len(SEEDS)


@pytest.mark.parametrize("name", REMEMBERING)
def test_both_branches_have_the_expert_that_was_drawn_for_the_condition(name: str) -> None:
    condition = Condition(torch.tensor([0, 1] * 4))
    ensemble, selection = whole(), SelectionConfig(name=name, t_switch=0.9)
    plain, twice = (ensemble.init_routing(SEEDS, condition, selection) for _ in range(2))
    field = guided_velocity(ensemble, condition, twice, 2.0)
    for number, t in enumerate((0.8, 0.5, 0.2)):
        noised, times = noise(8, number), torch.full((8,), t, dtype=torch.float64)
        expected = ensemble.gates(noised, times, condition, plain)
        before = {k: (expert.rows, expert.null_rows) for k, expert in ensemble.experts.items()}
        field(noised, times)
        for k, expert in ensemble.experts.items():
            rows, null_rows = expert.rows - before[k][0], expert.null_rows - before[k][1]
            assert rows == 2 * null_rows == 2 * int(expected[:, k].sum())


def test_above_the_switch_each_branch_has_gates_of_its_own() -> None:
    condition, t = Condition(torch.tensor([0] * 8)), torch.full((8,), 0.9, dtype=torch.float64)
    ensemble = whole()
    routing = ensemble.init_routing(SEEDS, condition, SelectionConfig(name="full_then_sticky")).repeated(2)
    both = Condition.concatenate([condition, NULL])
    told, untold = ensemble.gates(noise(8).repeat(2, 1), t.repeat(2), both, routing).chunk(2)
    assert (told[:, 3] == 0).all() and (untold[:, 3] > 0).all()


def test_branches_that_part_remember_for_themselves() -> None:
    routing = whole().init_routing(SEEDS, NULL, SelectionConfig(name="coupled_resample"))
    twice = routing.repeated(2)
    twice.memory.evaluations = 7
    assert routing.memory.evaluations == 0
    assert len(twice.memory.gates) == 2 * len(routing.memory.gates)
    assert twice.calls is routing.calls


def test_a_chain_of_draws_has_the_law_of_every_posterior_and_changes_by_their_distance() -> None:
    """Posteriors that do not answer to what was drawn, one of them seen twice at the same t, as by Heun."""
    rows, t = 40_000, torch.full((40_000,), 0.5)
    prior, *posteriors = torch.tensor(
        [[0.4, 0.3, 0.2, 0.1], [0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1], [0, 0, 0.5, 0.5]]
    )
    ensemble = Ensemble(experts=MIXTURE.experts(), noise_schedule=RECTIFIED_FLOW, router=MIXTURE.router())
    routing = ensemble.init_routing(range(rows), Condition.null(rows), SelectionConfig(name="coupled_resample"))
    last, before = routing.memory.gates, prior
    for posterior in posteriors:
        gates = routing.update_gates(posterior.log().expand(rows, -1), t)
        torch.testing.assert_close(gates.double().mean(0), posterior.double(), atol=0.01, rtol=0)
        changed = (gates != last).any(1).double().mean().item()
        assert changed == pytest.approx((posterior - before).abs().sum().item() / 2, abs=0.01)
        last, before = gates, posterior
