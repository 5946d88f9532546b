"""Laws for any experts: the mathematics of combining, solving, guiding and selecting."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ensemble.config import SamplingConfig
from ensemble.ensemble import Ensemble
from ensemble.sampling.guidance import guided_velocity
from ensemble.sampling.sample import sample
from ensemble.solvers import SOLVERS, uniform_times
from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import COSINE, NOISE_SCHEDULES, RECTIFIED_FLOW
from router.config import SelectionConfig
from router.selection import SELECTIONS
from tests.oracles import IdentityCodec, MixtureOfGaussians, Oracle, gaussian_velocity

logger = logging.getLogger(__name__)

UNBALANCED = (0.42, 0.15, 0.13, 0.07, 0.06, 0.06, 0.06, 0.05)


@st.composite
def routing_inputs(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in eighths (so that shifts are exact), t, and uniforms."""
    rows, experts = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    eighths = draw(st.lists(st.integers(-200, 200), min_size=rows * experts, max_size=rows * experts))
    unit = st.floats(0, 1, exclude_max=True, width=32)
    t = draw(st.lists(unit, min_size=rows, max_size=rows))
    uniforms = draw(st.lists(unit, min_size=rows * 3, max_size=rows * 3))
    return (
        torch.tensor(eighths, dtype=torch.float64).reshape(rows, experts) / 8,
        torch.tensor(t, dtype=torch.float64),
        torch.tensor(uniforms, dtype=torch.float64).reshape(rows, 3),
    )


SELECTION_CONFIGS = st.builds(
    SelectionConfig,
    name=st.sampled_from(list(SELECTIONS)),
    k=st.integers(1, 8),
    probability=st.floats(0.01, 0.99),
    total=st.floats(0.01, 1.0),
    draws=st.just(3),
    t_switch=st.floats(0, 1),
)


@settings(deadline=None)
@given(routing_inputs(), SELECTION_CONFIGS)
def test_gates_sum_to_one_and_missing_experts_are_zero(
    inputs: tuple[Tensor, Tensor, Tensor], config: SelectionConfig
) -> None:
    logits, t, uniforms = inputs
    logits = logits.clone()
    logits[:, 1::2] = -torch.inf
    gates = SELECTIONS[config.name].gates(logits, t, uniforms, config)
    assert (gates >= 0).all()
    assert (gates[:, 1::2] == 0).all()
    torch.testing.assert_close(gates.sum(1), torch.ones(len(gates), dtype=torch.float64), atol=1e-12, rtol=0)


@settings(deadline=None)
@given(routing_inputs(), st.integers(1, 6))
def test_top_k_selects_k_experts_and_top_all_is_full(inputs: tuple[Tensor, Tensor, Tensor], k: int) -> None:
    logits, t, uniforms = inputs
    gates = SELECTIONS["top_k"].gates(logits, t, uniforms, SelectionConfig(name="top_k", k=k))
    assert ((gates > 0).sum(1) == min(k, logits.shape[1])).all()
    all_experts = SelectionConfig(name="top_k", k=logits.shape[1])
    full = SELECTIONS["full"].gates(logits, t, uniforms, SelectionConfig(name="full"))
    assert torch.equal(SELECTIONS["top_k"].gates(logits, t, uniforms, all_experts), full)


@settings(deadline=None)
@given(routing_inputs(), SELECTION_CONFIGS, st.integers(-8000, 8000))
def test_gates_are_invariant_to_shifts_of_the_logits(
    inputs: tuple[Tensor, Tensor, Tensor], config: SelectionConfig, eighths: int
) -> None:
    logits, t, uniforms = inputs
    gates = SELECTIONS[config.name].gates
    assert torch.equal(gates(logits + eighths / 8, t, uniforms, config), gates(logits, t, uniforms, config))


def points(rows: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compute_velocity(ensemble: Ensemble, noised: Tensor, t: Tensor, **settings: object) -> Tensor:
    null = Condition.null(len(noised))
    return ensemble.velocity(
        noised, t, null, ensemble.init_routing(range(len(noised)), null, SelectionConfig(**settings))
    )


def test_one_hot_gates_give_the_velocity_of_one_expert() -> None:
    mixture = MixtureOfGaussians((0.0, 0.0, 1.0, 0.0))
    ensemble = Ensemble(experts=mixture.experts(), noise_schedule=RECTIFIED_FLOW, router=mixture.router())
    noised, t = points(16), torch.linspace(0.05, 1, 16, dtype=torch.float64)
    expected = mixture.experts()[2].velocity(noised, t, Condition.null(16), RECTIFIED_FLOW)
    for name in SELECTIONS:
        assert torch.equal(compute_velocity(ensemble, noised, t, name=name), expected), name


def test_monolith_is_an_ensemble_of_one() -> None:
    expert = Oracle(torch.tensor([1.0, -1.0], dtype=torch.float64), 0.5)
    ensemble = Ensemble(experts={0: expert}, noise_schedule=COSINE)
    noised, t = points(16), torch.linspace(0.05, 0.95, 16, dtype=torch.float64)
    expected = expert.velocity(noised, t, Condition.null(16), COSINE)
    for name in SELECTIONS:
        assert torch.equal(compute_velocity(ensemble, noised, t, name=name), expected), name


@settings(max_examples=20, deadline=None)
@given(SELECTION_CONFIGS, st.integers(0, 1000))
def test_equal_experts_make_the_gates_irrelevant(config: SelectionConfig, seed: int) -> None:
    mixture = MixtureOfGaussians((0.6, 0.3, 0.1))
    expert = Oracle(torch.tensor([0.5, 0.5], dtype=torch.float64), 0.5)
    ensemble = Ensemble(experts=dict.fromkeys(range(3), expert), noise_schedule=RECTIFIED_FLOW, router=mixture.router())
    noised, t, null = points(8, seed), torch.linspace(0.1, 0.9, 8, dtype=torch.float64), Condition.null(8)
    routing = ensemble.init_routing(range(8), null, config)
    torch.testing.assert_close(
        ensemble.velocity(noised, t, null, routing),
        expert.velocity(noised, t, null, RECTIFIED_FLOW),
        atol=1e-6,
        rtol=1e-6,
    )


@pytest.mark.parametrize("schedule", list(NOISE_SCHEDULES))
def test_exact_experts_and_router_give_the_marginal_velocity(schedule: str) -> None:
    mixture = MixtureOfGaussians(UNBALANCED)
    ensemble = Ensemble(
        experts=mixture.experts(),
        noise_schedule=NOISE_SCHEDULES[schedule],
        router=mixture.router(NOISE_SCHEDULES[schedule]),
    )
    noised, t = points(200), torch.linspace(0.01, 0.99, 200, dtype=torch.float64)
    expected = mixture.marginal_velocity(noised, t, NOISE_SCHEDULES[schedule])
    torch.testing.assert_close(compute_velocity(ensemble, noised, t, name="full"), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("schedule", list(NOISE_SCHEDULES))
def test_solvers_converge_at_their_order(name: str, order: int, schedule: str) -> None:
    """The flow of one Gaussian preserves quantiles, so noise z ends at mean + deviation z."""
    mean, deviation = torch.tensor([1.5, -0.5], dtype=torch.float64), 0.6
    noise, steps = points(8), np.array([16, 32, 64, 128])
    exact = mean + deviation * noise

    def error(count: int) -> float:
        def velocity(noised: Tensor, t: Tensor) -> Tensor:
            return gaussian_velocity(noised, t, mean, deviation, NOISE_SCHEDULES[schedule])

        return (SOLVERS[name](velocity, noise, uniform_times(int(count))) - exact).abs().max().item()

    errors = [error(count) for count in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    if "linear" in schedule:  # its velocity grows as 1 / sqrt(t) towards t = 0: no solver has its order there
        assert slope < -0.5, errors
    else:
        assert -slope == pytest.approx(order, abs=0.2), errors


@pytest.mark.parametrize("name", list(SELECTIONS))
def test_guidance_scale_one_has_no_unconditional_calls(name: str) -> None:
    mixture = MixtureOfGaussians((0.5, 0.3, 0.2))
    condition, noised, t = Condition(torch.tensor([0, 1, 0, 1])), points(4), torch.full((4,), 0.6, dtype=torch.float64)
    null_rows = {}
    for scale in (1.0, 1.5):
        ensemble = Ensemble(experts=mixture.experts(), noise_schedule=RECTIFIED_FLOW, router=mixture.router())
        routing = ensemble.init_routing(range(4), condition, SelectionConfig(name=name))
        guided_velocity(ensemble, condition, routing, scale)(noised, t)
        null_rows[scale] = sum(expert.null_rows for expert in ensemble.experts.values())
        assert ensemble.router.calls == (0 if name in ("sticky", "sticky_resample") else 1)
    assert null_rows[1.0] == 0
    assert null_rows[1.5] >= 4


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("name", list(SELECTIONS))
def test_image_does_not_depend_on_the_batch(name: str, guidance_scale: float) -> None:
    mixture = MixtureOfGaussians((0.5, 0.3, 0.2), allowed=((0, 1), (1, 2)))
    ensemble = Ensemble(experts=mixture.experts(), noise_schedule=RECTIFIED_FLOW, router=mixture.router())
    seeds, classes = [3, 1000, 17, 2**35, 4], [0, 1, -1, 0, 1]

    def latents(rows: slice, batch_size: int) -> Tensor:
        config = SamplingConfig(
            steps=6,
            guidance_scale=guidance_scale,
            selection=SelectionConfig(name=name, draws=2),
            batch_size=batch_size,
        )
        return sample(ensemble, IdentityCodec(), seeds[rows], config, Condition.of_classes(classes[rows])).latents

    together = latents(slice(None), 5)
    torch.testing.assert_close(latents(slice(None), 2), together, atol=1e-5, rtol=0)
    for row in range(5):
        torch.testing.assert_close(latents(slice(row, row + 1), 1), together[row : row + 1], atol=1e-5, rtol=0)


def cluster_shares(name: str, count: int, steps: int) -> Tensor:
    """Return the shares of the clusters among samples of an unbalanced mixture with exact experts and router."""
    mixture = MixtureOfGaussians(UNBALANCED, deviation=0.15)
    ensemble = Ensemble(experts=mixture.experts(), noise_schedule=RECTIFIED_FLOW, router=mixture.router())
    config = SamplingConfig(solver="euler", steps=steps, selection=SelectionConfig(name=name), batch_size=count)
    counts = mixture.nearest(sample(ensemble, IdentityCodec(), range(count), config).latents)
    return torch.tensor([counts[k] / count for k in range(len(UNBALANCED))], dtype=torch.float64)


def test_sticky_reproduces_the_shares_and_top_1_does_not() -> None:
    """Near t = 1 the posterior is the prior, so top-1 sends every sample to the largest cluster."""
    count, truth = 4000, torch.tensor(UNBALANCED, dtype=torch.float64)
    sticky, top_1 = cluster_shares("sticky", count, 25), cluster_shares("top_k", count, 25)
    sampling_error = (truth * (1 - truth) / count).sqrt()
    logger.info("largest cluster: data %.3f, sticky %.3f, top-1 %.3f", truth[0], sticky[0], top_1[0])
    logger.info("total variation: sticky %.3f, top-1 %.3f", *((s - truth).abs().sum() / 2 for s in (sticky, top_1)))
    assert ((sticky - truth).abs() < 4 * sampling_error).all(), sticky
    assert top_1[0] > 0.75, top_1
    assert (top_1 - truth).abs().sum() / 2 > 0.3


@pytest.mark.parametrize("name", ["full", "sample", "threshold", "full_then_sticky", "sticky_resample"])
def test_exact_selections_reproduce_the_shares(name: str) -> None:
    shares = cluster_shares(name, 2000, 25)
    assert (shares - torch.tensor(UNBALANCED)).abs().sum() / 2 < 0.05
