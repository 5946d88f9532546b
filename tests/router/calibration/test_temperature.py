import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from experts.condition import Condition
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.training.latent_dataset import LatentDataset
from router.calibration.temperature import (
    LabelledLogits,
    apply_temperature,
    fit_branch,
    fit_temperatures,
    unit_temperatures,
)
from router.calibration.time_bins import BINS, at_t
from tests.oracles import MixtureOfGaussians

MIXTURE = MixtureOfGaussians((0.6, 0.4), deviation=1.2)


def drawn(temperatures: Tensor, count: int = 40_000, experts: int = 4) -> LabelledLogits:
    """Logits whose clusters are drawn at these temperatures."""
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(count, generator=generator, dtype=torch.float64)
    said = 3 * torch.randn(count, experts, generator=generator, dtype=torch.float64)
    probability = (said / at_t(temperatures.log(), t).exp().unsqueeze(-1)).softmax(-1)
    cluster_id = torch.multinomial(probability, 1, generator=generator).squeeze(-1)
    return LabelledLogits(logits=said, t=t, cluster_id=cluster_id)


def cross_entropy(answers: LabelledLogits, temperatures: Tensor) -> float:
    condition = Condition.null(len(answers.t))
    cool = apply_temperature(answers.logits, torch.stack([unit_temperatures()[0], temperatures]), answers.t, condition)
    return functional.cross_entropy(cool, answers.cluster_id).item()


@pytest.mark.parametrize("known", [torch.full((BINS,), 2.5), torch.full((BINS,), 0.4), torch.linspace(0.5, 3, BINS)])
def test_known_temperatures_are_found(known: Tensor) -> None:
    found = fit_branch(drawn(known.double()))
    torch.testing.assert_close(found.log(), known.double().log(), atol=0.12, rtol=0)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 300))
def test_cross_entropy_never_rises_on_the_samples_it_was_fitted_on(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    answers = LabelledLogits(
        logits=5 * torch.randn(count, 3, generator=generator, dtype=torch.float64),
        t=torch.rand(count, generator=generator, dtype=torch.float64),
        cluster_id=torch.randint(3, (count,), generator=generator),
    )
    assert cross_entropy(answers, fit_branch(answers)) <= cross_entropy(answers, unit_temperatures()[0])


@given(st.lists(st.floats(0.05, 20), min_size=2 * BINS, max_size=2 * BINS), st.integers(0, 1000))
def test_the_most_probable_expert_stays_the_most_probable(numbers: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, t = torch.randn(50, 5, generator=generator), torch.rand(50, generator=generator)
    condition = Condition(torch.arange(50) % 3 - 1)
    cool = apply_temperature(logits, torch.tensor(numbers, dtype=torch.float64).reshape(2, BINS), t, condition)
    assert torch.equal(cool.argmax(-1), logits.argmax(-1))


def test_rows_with_a_condition_and_null_rows_have_their_own() -> None:
    temperatures = torch.stack([torch.full((BINS,), 2.0), torch.full((BINS,), 4.0)]).double()
    cool = apply_temperature(torch.ones(2, 3), temperatures, torch.tensor([0.3, 0.3]), Condition(torch.tensor([0, -1])))
    torch.testing.assert_close(cool, torch.tensor([[0.5] * 3, [0.25] * 3]))


def test_no_temperatures_change_no_bit() -> None:
    logits, t = torch.randn(50, 5), torch.rand(50)
    assert torch.equal(apply_temperature(logits, unit_temperatures(), t, Condition.null(50)), logits)


def held_out(count: int = 4000) -> LatentDataset:
    generator = torch.Generator().manual_seed(0)
    cluster_id = (torch.arange(count) % 5 > 2).long()
    clean = MIXTURE.means[cluster_id] + 1.2 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return LatentDataset(clean=clean.float(), class_id=torch.full((count,), -1), cluster_id=cluster_id)


def test_an_overconfident_posterior_is_cooled_and_an_exact_one_is_left() -> None:
    """Any posterior will do; without labels the branch of the condition is not fitted."""
    router = MIXTURE.router()
    exact = fit_temperatures(router.logits, held_out(), RECTIFIED_FLOW)
    sharp = fit_temperatures(lambda *asked: 3 * router.logits(*asked), held_out(), RECTIFIED_FLOW)
    torch.testing.assert_close(exact[1], unit_temperatures()[1], atol=0.25, rtol=0)
    torch.testing.assert_close(sharp[1], 3 * exact[1], atol=0.25, rtol=0.02)
    assert torch.equal(exact[0], unit_temperatures()[0])
    assert torch.equal(fit_temperatures(router.logits, held_out(), RECTIFIED_FLOW), exact)
