import pytest
import torch

from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from router.models.prior_table import PriorTableRouter, compute_log_prior
from router.router import Router


def make_router(counts: list[list[float]]) -> Router:
    prior_counts = torch.tensor(counts, dtype=torch.float64)
    return Router(
        model=PriorTableRouter.from_counts(prior_counts), noise_schedule=RECTIFIED_FLOW, prior_counts=prior_counts
    )


def test_logits_equal_the_prior_for_any_noised_and_t() -> None:
    table, condition = make_router([[6, 2, 1], [1, 1, 4], [7, 3, 5]]), Condition(torch.tensor([0, 1, -1]))
    expected = table.prior_logits(condition).float()
    for t in (0.0, 0.5, 1.0):
        logits = table.logits(torch.randn(3, 5), torch.full((3,), t), condition)
        torch.testing.assert_close(logits, expected - expected.logsumexp(-1, keepdim=True))


def test_cluster_without_samples_of_class_has_small_prior() -> None:
    """Three of all four samples are in cluster 0; class 1 has one sample, in cluster 1."""
    counts = torch.tensor([[3, 0], [0, 1], [0, 0], [3, 1]], dtype=torch.float64)
    expected = [[1, 0.25 / 4], [0.75 / 2, 1], [0.75, 0.25], [0.75, 0.25]]
    torch.testing.assert_close(compute_log_prior(counts).exp(), torch.tensor(expected, dtype=torch.float64))


def test_prior_table_has_no_parameters() -> None:
    assert not list(make_router([[1, 1]]).model.parameters())


def test_prior_table_is_close_to_the_exact_prior() -> None:
    table, condition = make_router([[600, 0, 0], [200, 200, 200], [800, 200, 200]]), Condition(torch.tensor([0]))
    probability = table.logits(torch.zeros(1, 2), torch.zeros(1), condition).softmax(-1)
    prior = table.prior_logits(condition).softmax(-1)
    assert (probability - prior).abs().sum().item() / 2 == pytest.approx(0, abs=1 / 601)
