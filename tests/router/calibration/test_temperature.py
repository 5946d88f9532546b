import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.training.latent_dataset import LatentDataset
from router.calibration.temperature import (
    LabeledLogits,
    apply_temperature,
    fit_branch,
    fit_temperatures,
    unit_temperatures,
)
from router.calibration.time_bins import BINS, interpolate
from tests.oracles import MixtureOfGaussians

MIXTURE = MixtureOfGaussians((0.6, 0.4), deviation=1.2)


def sample_logits(temperatures: Tensor, count: int = 40_000, experts: int = 4) -> LabeledLogits:
    """Sample logits, and clusters from their softmax at these temperatures."""
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(count, generator=generator, dtype=torch.float64)
    logits = 3 * torch.randn(count, experts, generator=generator, dtype=torch.float64)
    probability = (logits / interpolate(temperatures.log(), t).exp().unsqueeze(-1)).softmax(-1)
    cluster_id = torch.multinomial(probability, 1, generator=generator).squeeze(-1)
    return LabeledLogits(logits=logits, t=t, cluster_id=cluster_id)


def cross_entropy(labeled: LabeledLogits, temperatures: Tensor) -> float:
    condition = Condition.null(len(labeled.t))
    calibrated = apply_temperature(
        labeled.logits, torch.stack([unit_temperatures()[0], temperatures]), labeled.t, condition
    )
    return functional.cross_entropy(calibrated, labeled.cluster_id).item()


@pytest.mark.parametrize("known", [torch.full((BINS,), 2.5), torch.full((BINS,), 0.4), torch.linspace(0.5, 3, BINS)])
def test_fit_branch_recovers_known_temperatures(known: Tensor) -> None:
    fitted = fit_branch(sample_logits(known.double()))
    torch.testing.assert_close(fitted.log(), known.double().log(), atol=0.12, rtol=0)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 300))
def test_fit_never_raises_cross_entropy_on_its_samples(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labeled = LabeledLogits(
        logits=5 * torch.randn(count, 3, generator=generator, dtype=torch.float64),
        t=torch.rand(count, generator=generator, dtype=torch.float64),
        cluster_id=torch.randint(3, (count,), generator=generator),
    )
    assert cross_entropy(labeled, fit_branch(labeled)) <= cross_entropy(labeled, unit_temperatures()[0])


@given(st.lists(st.floats(0.05, 20), min_size=2 * BINS, max_size=2 * BINS), st.integers(0, 1000))
def test_temperatures_preserve_the_most_probable_expert(numbers: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, t = torch.randn(50, 5, generator=generator), torch.rand(50, generator=generator)
    condition = Condition(torch.arange(50) % 3 - 1)
    calibrated = apply_temperature(logits, torch.tensor(numbers, dtype=torch.float64).reshape(2, BINS), t, condition)
    assert torch.equal(calibrated.argmax(-1), logits.argmax(-1))


def test_conditional_and_null_rows_have_separate_temperatures() -> None:
    temperatures = torch.stack([torch.full((BINS,), 2.0), torch.full((BINS,), 4.0)]).double()
    calibrated = apply_temperature(
        torch.ones(2, 3), temperatures, torch.tensor([0.3, 0.3]), Condition(torch.tensor([0, -1]))
    )
    torch.testing.assert_close(calibrated, torch.tensor([[0.5] * 3, [0.25] * 3]))


def test_unit_temperatures_change_no_bit() -> None:
    logits, t = torch.randn(50, 5), torch.rand(50)
    assert torch.equal(apply_temperature(logits, unit_temperatures(), t, Condition.null(50)), logits)


def held_out(count: int = 4000) -> LatentDataset:
    generator = torch.Generator().manual_seed(0)
    cluster_id = (torch.arange(count) % 5 > 2).long()
    clean = MIXTURE.means[cluster_id] + 1.2 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return LatentDataset(clean=clean.float(), class_id=torch.full((count,), -1), cluster_id=cluster_id)


def test_fit_cools_overconfident_and_keeps_exact_posterior() -> None:
    """Any posterior works; without labels the conditional branch is not fitted."""
    router = MIXTURE.router()
    exact = fit_temperatures(router.logits, held_out(), RECTIFIED_FLOW)
    overconfident = fit_temperatures(lambda *inputs: 3 * router.logits(*inputs), held_out(), RECTIFIED_FLOW)
    torch.testing.assert_close(exact[1], unit_temperatures()[1], atol=0.25, rtol=0)
    torch.testing.assert_close(overconfident[1], 3 * exact[1], atol=0.25, rtol=0.02)
    assert torch.equal(exact[0], unit_temperatures()[0])
    assert torch.equal(fit_temperatures(router.logits, held_out(), RECTIFIED_FLOW), exact)
