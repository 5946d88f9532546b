"""Routing state: gates over a trajectory, independence of the batch, branches of guidance."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.routing import ExpertRows, find_expert_rows
from ensemble.sampling.guidance import guided_velocity
from ensemble.sampling.sample import sample
from ensemble.solvers import SOLVERS, uniform_times
from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from router.config import SelectionConfig
from router.selection import SELECTIONS
from tests.oracles import IdentityCodec, MixtureOfGaussians

MIXTURE = MixtureOfGaussians((0.4, 0.3, 0.2, 0.1), radius=0.8, allowed=((0, 1, 2), (1, 2, 3)))
SEEDS = [3, 1000, 17, 2**35, 4, 8, 9, 10]
NULL = Condition.null(len(SEEDS))
STATEFUL = ["sticky", "full_then_sticky", "sticky_resample", "coupled_resample"]


def make_ensemble() -> Ensemble:
    return Ensemble(experts=MIXTURE.experts(), noise_schedule=RECTIFIED_FLOW, router=MIXTURE.router())


def noise(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gates_along(selection: SelectionConfig, seeds: list[int], solver: str = "heun", steps: int = 8) -> Tensor:
    """Return the gates of every evaluation of a trajectory."""
    ensemble, null = make_ensemble(), Condition.null(len(seeds))
    state = ensemble.init_routing(seeds, null, selection)
    gates = []

    def velocity(noised: Tensor, t: Tensor) -> Tensor:
        result = ensemble.velocity(noised, t, null, state)
        gates.append(state.state.gates.double())
        return result

    start = torch.cat([noise(1, seed % 2**20) for seed in seeds])
    SOLVERS[solver](velocity, start, uniform_times(steps))
    return torch.stack(gates)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("name", list(SELECTIONS))
def test_gates_do_not_depend_on_the_batch(name: str, solver: str) -> None:
    selection = SelectionConfig(name=name)
    together = gates_along(selection, SEEDS, solver, 5)
    for row in (0, 3, 7):
        torch.testing.assert_close(gates_along(selection, [SEEDS[row]], solver, 5), together[:, row : row + 1])
    backwards = gates_along(selection, SEEDS[::-1], solver, 5)
    torch.testing.assert_close(backwards.flip(1), together)


@pytest.mark.parametrize(("name", "searches"), [("sticky", 1), ("full", 5)])
def test_rows_of_gates_that_stay_are_looked_for_once(name: str, searches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def find(gates: Tensor) -> Sequence[ExpertRows]:
        seen.append(gates)
        return find_expert_rows(gates)

    monkeypatch.setattr("ensemble.routing.find_expert_rows", find)
    gates_along(SelectionConfig(name=name), SEEDS, "euler", 5)
    assert len(seen) == searches


def test_rows_of_trajectories_are_those_of_their_seeds() -> None:
    ensemble, selection, index = make_ensemble(), SelectionConfig(name="sticky"), torch.tensor([6, 1, 3])
    chosen = ensemble.init_routing(SEEDS, NULL, selection).rows(index)
    alone = ensemble.init_routing([SEEDS[row] for row in index.tolist()], Condition.null(3), selection)
    assert chosen.seeds == alone.seeds and chosen.calls is not alone.calls
    assert torch.equal(chosen.gates, alone.gates)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_full_then_sticky_mixes_above_t_switch_only(solver: str) -> None:
    gates = gates_along(SelectionConfig(name="full_then_sticky", t_switch=0.5), SEEDS, solver)
    num_selected = (gates > 0).sum(-1)
    first = next(number for number, row in enumerate(num_selected) if (row == 1).all())
    assert first == (4 if solver == "euler" else 7)  # Heun evaluates 4/8 in the step from 5/8
    assert (num_selected[:first] > 1).all()
    assert (gates[first:] == gates[first]).all()


def test_full_then_sticky_at_one_draws_from_the_prior() -> None:
    selection, seeds = SelectionConfig(name="full_then_sticky", t_switch=1.0), list(range(4000))
    gates = gates_along(selection, seeds, steps=3)
    assert (gates == gates[0]).all()
    torch.testing.assert_close(gates[0].mean(0), torch.tensor(MIXTURE.shares).double(), atol=0.03, rtol=0)


def test_full_then_sticky_at_zero_is_full() -> None:
    never, full = SelectionConfig(name="full_then_sticky", t_switch=0.0), SelectionConfig(name="full")
    assert torch.equal(gates_along(never, SEEDS), gates_along(full, SEEDS))


def test_sticky_resample_changes_once_at_t_switch() -> None:
    never, sticky = SelectionConfig(name="sticky_resample", t_switch=0.0), SelectionConfig(name="sticky")
    assert torch.equal(gates_along(never, SEEDS), gates_along(sticky, SEEDS))
    seeds = list(range(300))
    gates = gates_along(SelectionConfig(name="sticky_resample", t_switch=0.8), seeds)
    changes = (gates[1:] != gates[:-1]).any(-1)
    assert changes.any(1).sum() == 1
    assert 150 < changes.sum() < 260


def test_frozen_gates_stay_when_t_increases() -> None:
    ensemble = make_ensemble()
    for name in ("full_then_sticky", "sticky_resample"):
        routing = ensemble.init_routing(SEEDS, NULL, SelectionConfig(name=name))
        low, high = torch.full((8,), 0.3, dtype=torch.float64), torch.full((8,), 0.9, dtype=torch.float64)
        frozen = ensemble.gates(noise(8), low, NULL, routing)
        assert torch.equal(ensemble.gates(noise(8, 1), high, NULL, routing), frozen)
        assert torch.equal(ensemble.gates(noise(8, 2), low, NULL, routing), frozen)


def test_rows_freeze_independently() -> None:
    ensemble = make_ensemble()
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
    ("name", "calls_per_row"), [("sticky", 0), ("sticky_resample", 1), ("full_then_sticky", 6), ("coupled_resample", 9)]
)
def test_router_calls_match_the_selection(name: str, calls_per_row: int) -> None:
    ensemble = make_ensemble()
    config = SamplingConfig(solver="heun", steps=5, selection=SelectionConfig(name=name, t_switch=0.5))
    assert sample(ensemble, IdentityCodec(), SEEDS, config).calls.router == calls_per_row * len(SEEDS)


@pytest.mark.parametrize("name", STATEFUL)
def test_branches_share_the_expert_of_the_condition(name: str) -> None:
    condition = Condition(torch.tensor([0, 1] * 4))
    ensemble, selection = make_ensemble(), SelectionConfig(name=name, t_switch=0.9)
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


def test_branches_have_separate_gates_above_t_switch() -> None:
    condition, t = Condition(torch.tensor([0] * 8)), torch.full((8,), 0.9, dtype=torch.float64)
    ensemble = make_ensemble()
    routing = ensemble.init_routing(SEEDS, condition, SelectionConfig(name="full_then_sticky")).repeat(2)
    both = Condition.concatenate([condition, NULL])
    conditional, unconditional = ensemble.gates(noise(8).repeat(2, 1), t.repeat(2), both, routing).chunk(2)
    assert (conditional[:, 3] == 0).all() and (unconditional[:, 3] > 0).all()


def test_repeated_routing_has_its_own_state() -> None:
    routing = make_ensemble().init_routing(SEEDS, NULL, SelectionConfig(name="coupled_resample"))
    twice = routing.repeat(2)
    twice.state.evaluations = 7
    assert routing.state.evaluations == 0
    assert len(twice.state.gates) == 2 * len(routing.state.gates)
    assert twice.calls is routing.calls


def test_coupled_resample_follows_each_posterior() -> None:
    """The posteriors do not depend on the drawn experts; t is constant, as within one step of Heun."""
    rows, t = 40_000, torch.full((40_000,), 0.5)
    prior, *posteriors = torch.tensor(
        [[0.4, 0.3, 0.2, 0.1], [0.1, 0.4, 0.2, 0.3], [0.7, 0.1, 0.1, 0.1], [0, 0, 0.5, 0.5]]
    )
    ensemble = Ensemble(experts=MIXTURE.experts(), noise_schedule=RECTIFIED_FLOW, router=MIXTURE.router())
    routing = ensemble.init_routing(range(rows), Condition.null(rows), SelectionConfig(name="coupled_resample"))
    last, before = routing.state.gates, prior
    for posterior in posteriors:
        gates = routing.update_gates(posterior.log().expand(rows, -1), t)
        torch.testing.assert_close(gates.double().mean(0), posterior.double(), atol=0.01, rtol=0)
        changed = (gates != last).any(1).double().mean().item()
        assert changed == pytest.approx((posterior - before).abs().sum().item() / 2, abs=0.01)
        last, before = gates, posterior
