import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ensemble.solvers import SOLVERS, make_noise, uniform_times


def test_uniform_times_decrease_from_one_to_zero() -> None:
    assert uniform_times(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("name", list(SOLVERS))
def test_constant_velocity_is_integrated_exactly(name: str) -> None:
    noise = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    clean = SOLVERS[name](lambda noised, t: torch.full_like(noised, 2.0), noise, uniform_times(5))
    torch.testing.assert_close(clean, noise - 2)


def test_heun_is_exact_for_linear_t_except_the_last_step() -> None:
    def velocity(noised: Tensor, t: Tensor) -> Tensor:
        return 2 * t[:, None] * torch.ones_like(noised)

    clean = SOLVERS["heun"](velocity, torch.zeros(1, 1, dtype=torch.float64), uniform_times(4))
    # Trapezoids from 1 to 1/4 give 1/16 - 1; the last step is Euler's: -1/4 * 2 * 1/4.
    assert clean.item() == pytest.approx(-15 / 16 - 1 / 8, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "evaluations"), [("euler", 3), ("heun", 5), ("flow_match_euler", 3), ("flow_match_heun", 5)]
)
def test_solver_evaluates_the_given_times(name: str, evaluations: int) -> None:
    evaluated = []

    def velocity(noised: Tensor, t: Tensor) -> Tensor:
        evaluated.append(t[0].item())
        return noised

    times = torch.tensor([1.0, 0.5, 0.125, 0.0], dtype=torch.float64)
    SOLVERS[name](velocity, torch.ones(2, 3), times)
    assert len(evaluated) == evaluations
    assert set(evaluated) == {1.0, 0.5, 0.125}


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_diffusers_schedulers_take_the_same_steps(name: str) -> None:
    def velocity(noised: Tensor, t: Tensor) -> Tensor:
        return torch.sin(3 * noised) + t[:, None] ** 2

    noise, times = make_noise(range(8), (3,)), torch.tensor([1.0, 0.9, 0.6, 0.3, 0.1, 0.0], dtype=torch.float64)
    ours, theirs = SOLVERS[name](velocity, noise, times), SOLVERS[f"flow_match_{name}"](velocity, noise, times)
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def test_solver_may_stop_before_t_zero() -> None:
    times = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    for name, solver in SOLVERS.items():
        clean = solver(lambda noised, t: torch.ones_like(noised), torch.zeros(1, 2), times)
        assert clean.tolist() == [[-0.75, -0.75]], name


def test_noise_depends_on_its_own_seed_alone() -> None:
    together, alone = make_noise([7, 2**40, 7], (2, 3)), make_noise([2**40], (2, 3))
    assert torch.equal(together[1:2], alone)
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])


def test_noise_is_unit_gaussian() -> None:
    noise = make_noise(range(2000), (8,))
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03


def test_noise_without_seeds_is_empty() -> None:
    assert make_noise([], (2, 3)).shape == (0, 2, 3)


def test_shifted_times_are_those_of_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=uniform_times(7)[:-1].tolist())
    assert torch.allclose(uniform_times(7, 3.0).float(), scheduler.sigmas, atol=1e-6)
