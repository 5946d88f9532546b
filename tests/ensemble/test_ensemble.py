import pytest
import torch

from ensemble.ensemble import Ensemble, EnsembleError, ExpertOutput, combine_velocities
from ensemble.routing import occasion_uniforms, time_uniforms
from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import COSINE, RECTIFIED_FLOW
from router.config import SelectionConfig
from router.selection import SELECTIONS
from tests.oracles import MixtureOfGaussians

MIXTURE = MixtureOfGaussians((0.4, 0.3, 0.2, 0.1))
ROWS = 12
NULL = Condition.null(ROWS)
NOISED = torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.linspace(0.05, 0.95, ROWS, dtype=torch.float64)


def make_ensemble() -> Ensemble:
    return Ensemble(experts=MIXTURE.experts(), noise_schedule=RECTIFIED_FLOW, router=MIXTURE.router())


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"name": "full"}, 4 * ROWS),
        ({"name": "top_k", "k": 1}, ROWS),
        ({"name": "top_k", "k": 3}, 3 * ROWS),
        ({"name": "sticky"}, ROWS),
        ({"name": "sample"}, ROWS),
    ],
)
def test_velocity_calls_each_selected_expert_once(settings: dict[str, object], rows: int) -> None:
    ensemble = make_ensemble()
    routing = ensemble.init_routing(range(ROWS), NULL, SelectionConfig(**settings))
    ensemble.velocity(NOISED, T, NULL, routing)
    assert sum(routing.calls.experts.values()) == rows
    assert sum(expert.rows for expert in ensemble.experts.values()) == rows
    assert all(expert.calls <= 1 for expert in ensemble.experts.values())


def test_sticky_keeps_its_experts_without_router_calls() -> None:
    ensemble = make_ensemble()
    routing = ensemble.init_routing(range(ROWS), NULL, SelectionConfig(name="sticky"))
    early = ensemble.gates(NOISED, T, NULL, routing)
    late = ensemble.gates(-NOISED, T / 2, NULL, routing)
    assert torch.equal(early, late)
    assert ensemble.router.calls == routing.calls.router == 0


def test_router_calls_are_counted_by_row() -> None:
    ensemble = make_ensemble()
    routing = ensemble.init_routing(range(ROWS), NULL, SelectionConfig(name="full"))
    ensemble.velocity(NOISED, T, NULL, routing)
    assert routing.calls.router == ROWS


def test_sticky_draws_from_the_prior_of_the_class() -> None:
    mixture = MixtureOfGaussians((0.4, 0.3, 0.2, 0.1), allowed=((0, 1), (3,)))
    ensemble = Ensemble(experts=mixture.experts(), noise_schedule=RECTIFIED_FLOW, router=mixture.router())
    condition = Condition(torch.tensor([0, 1] * 20))
    gates = ensemble.init_routing(range(40), condition, SelectionConfig(name="sticky")).state.gates
    assert gates[1::2].argmax(1).tolist() == [3] * 20
    assert set(gates[::2].argmax(1).tolist()) == {0, 1}


@pytest.mark.parametrize("name", list(SELECTIONS))
def test_missing_expert_has_zero_gates(name: str) -> None:
    experts = {k: expert for k, expert in MIXTURE.experts().items() if k != 1}
    ensemble = Ensemble(experts=experts, noise_schedule=RECTIFIED_FLOW, router=MIXTURE.router())
    routing = ensemble.init_routing(range(ROWS), NULL, SelectionConfig(name=name))
    gates = ensemble.gates(NOISED, T, NULL, routing)
    assert ensemble.missing == (1,)
    assert gates[:, 1].tolist() == [0] * ROWS
    torch.testing.assert_close(gates.sum(1).double(), torch.ones(ROWS, dtype=torch.float64))
    if name == "full":
        complete = make_ensemble()
        complete_gates = complete.gates(
            NOISED, T, NULL, complete.init_routing(range(ROWS), NULL, SelectionConfig(name=name))
        )
        remaining = complete_gates * torch.tensor([1, 0, 1, 1])
        torch.testing.assert_close(gates, remaining / remaining.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("ids", "has_router", "message"),
    [([], True, "all are missing"), ([0, 4], True, r"got \[4\]"), ([0, 1], False, "add their router")],
)
def test_ensemble_of_invalid_experts_raises(ids: list[int], has_router: bool, message: str) -> None:
    experts = {k: MIXTURE.experts()[k % 4] for k in ids}
    with pytest.raises(EnsembleError, match=message):
        Ensemble(experts=experts, noise_schedule=RECTIFIED_FLOW, router=MIXTURE.router() if has_router else None)


def test_router_of_another_noise_schedule_raises() -> None:
    with pytest.raises(EnsembleError, match="rectified_flow"):
        Ensemble(experts=MIXTURE.experts(), noise_schedule=COSINE, router=MIXTURE.router(RECTIFIED_FLOW))


def test_routing_with_unpaired_seeds_raises() -> None:
    with pytest.raises(ValueError, match="every row needs a seed"):
        make_ensemble().init_routing([1, 2], Condition.null(3), SelectionConfig())


def test_velocity_accepts_t_per_element() -> None:
    ensemble = make_ensemble()
    routing = ensemble.init_routing(range(ROWS), NULL, SelectionConfig(name="full"))
    t_per_element = T[:, None].expand(-1, 2)
    torch.testing.assert_close(
        ensemble.velocity(NOISED, t_per_element, NULL, routing), ensemble.velocity(NOISED, T, NULL, routing)
    )


def test_combine_velocities_is_differentiable() -> None:
    velocity = torch.ones(2, 3, requires_grad=True)
    mixed = combine_velocities(
        torch.zeros(4, 3), [ExpertOutput(rows=torch.tensor([1, 3]), gates=torch.tensor([0.25, 1.0]), velocity=velocity)]
    )
    mixed.sum().backward()
    assert mixed[:, 0].tolist() == [0, 0.25, 0, 1]
    assert velocity.grad[:, 0].tolist() == [0.25, 1]


def test_uniforms_depend_on_seed_and_t_alone() -> None:
    t = torch.full((3,), 0.5)
    uniforms = time_uniforms([5, -1, 5], t, 2)
    assert torch.equal(uniforms[0], uniforms[2])
    assert torch.equal(uniforms[1:2], time_uniforms([-1], t[:1], 2))
    assert not torch.equal(uniforms, time_uniforms([5, -1, 5], t / 2, 2))
    seeds, t = range(20_000), torch.full((20_000,), 0.3)
    many = torch.cat([occasion_uniforms(seeds, 1), time_uniforms(seeds, t, 1)], 1)
    assert many.min() >= 0 and many.max() < 1
    torch.testing.assert_close(many.mean(0), torch.full((2,), 0.5, dtype=torch.float64), atol=0.01, rtol=0)
    assert abs(torch.corrcoef(many.T)[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack([many[:-1, 0], many[1:, 0]]))[0, 1]) < 0.03
