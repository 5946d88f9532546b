"""The router `density` against the exact posterior of Gaussians."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ensemble.ensemble import Ensemble
from experts.conditions.condition import Condition
from experts.diffusion.few_step import FewStepSchedule
from experts.diffusion.noise_schedule import COSINE, RECTIFIED_FLOW, NoiseSchedule
from router.config import SelectionConfig
from router.models.density import DensityError, DensityRouter
from router.router import Router
from tests.oracles import Oracle, OracleRouter

SHARES = (0.5, 0.3, 0.2)
COUNTS = torch.tensor([SHARES], dtype=torch.float64) * 100
MEANS = torch.tensor([[0.0, 0.0], [1.0, 0.5], [-0.5, 1.5]], dtype=torch.float64)
DEVIATIONS = (0.3, 0.3, 0.6)
ROWS = 300


def make_router(draws: int, schedule: NoiseSchedule = RECTIFIED_FLOW) -> Router:
    model = DensityRouter(3, 0, draws)
    model.log_prior = COUNTS.div(100).log()
    return Router(model=model, noise_schedule=schedule, prior_counts=COUNTS)


def make_ensemble(draws: int, schedule: NoiseSchedule = RECTIFIED_FLOW) -> Ensemble:
    experts = {k: Oracle(MEANS[k], deviation) for k, deviation in enumerate(DEVIATIONS)}
    return Ensemble(experts=experts, noise_schedule=schedule, router=make_router(draws, schedule))


def gates_of(ensemble: Ensemble, noised: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    condition = Condition.null(len(noised))
    return ensemble.gates(
        noised, t, condition, ensemble.init_routing(range(len(noised)), condition, SelectionConfig(name="full"))
    )


def distance_to_posterior(draws: int, level: float, schedule: NoiseSchedule) -> float:
    generator = torch.Generator().manual_seed(0)
    cluster = torch.multinomial(torch.tensor(SHARES), ROWS, replacement=True, generator=generator)
    spread = torch.tensor(DEVIATIONS)[cluster][:, None]
    clean = MEANS[cluster] + spread * torch.randn(ROWS, 2, generator=generator, dtype=torch.float64)
    t = torch.full((ROWS,), level, dtype=torch.float64)
    noised = schedule.add_noise(clean, torch.randn(ROWS, 2, generator=generator, dtype=torch.float64), t)
    exact = OracleRouter(MEANS, DEVIATIONS, SHARES, schedule).logits(noised, t, Condition.null(ROWS)).softmax(1)
    return float((gates_of(make_ensemble(draws, schedule), noised, t) - exact).abs().sum(1).mean() / 2)


@pytest.mark.parametrize("schedule", [RECTIFIED_FLOW, COSINE], ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("level", [0.05, 0.3, 0.7])
def test_gates_converge_to_the_exact_posterior(schedule: NoiseSchedule, level: float) -> None:
    few, many = distance_to_posterior(4, level, schedule), distance_to_posterior(64, level, schedule)
    assert many < 0.02 and many < few


def test_pure_noise_leaves_the_prior() -> None:
    gates = gates_of(make_ensemble(4), torch.randn(5, 2, dtype=torch.float64), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(gates, COUNTS.div(100).expand(5, 3))


def test_missing_expert_gets_no_gate_and_changes_no_odds() -> None:
    noised, t = torch.randn(6, 2, dtype=torch.float64), torch.full((6,), 0.5, dtype=torch.float64)
    complete = make_ensemble(8)
    without = replace(complete, experts={k: complete.experts[k] for k in (0, 2)})
    gates, fewer = gates_of(complete, noised, t), gates_of(without, noised, t)
    assert (fewer[:, 1] == 0).all()
    torch.testing.assert_close(fewer[:, 0] / fewer[:, 2], gates[:, 0] / gates[:, 2])


def test_row_is_the_same_alone_and_experts_are_called_by_draw() -> None:
    ensemble, noised = make_ensemble(4), torch.randn(6, 2, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    together = gates_of(ensemble, noised, t)
    assert [expert.calls for expert in ensemble.experts.values()] == [4, 4, 4]
    torch.testing.assert_close(gates_of(ensemble, noised[2:3], t[2:3]), together[2:3], rtol=0, atol=1e-14)


def test_saved_router_is_the_same(tmp_path: Path) -> None:
    make_router(6).save(tmp_path)
    loaded = Router.load(tmp_path)
    assert loaded.reads_experts and loaded.model.draws == 6


class Student(Oracle):
    few_step = FewStepSchedule.uniform(1, "euler")


def test_students_of_few_steps_are_refused() -> None:
    experts = {k: Student(mean, 0.3) for k, mean in enumerate(MEANS)}
    ensemble = replace(make_ensemble(4), experts=experts)
    with pytest.raises(DensityError, match=r"experts \[0, 1, 2\] take few; use ensemble.selection.name=sticky"):
        gates_of(ensemble, torch.randn(2, 2, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64))
