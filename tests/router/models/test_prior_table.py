import pytest
import torch

from experts.condition import Condition
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from router.models.prior_table import PriorTableRouter, log_prior
from router.router import Router


def router(counts: list[list[float]]) -> Router:
    tensor = torch.tensor(counts, dtype=torch.float64)
    return Router(model=PriorTableRouter.of(tensor), noise_schedule=RECTIFIED_FLOW, prior_counts=tensor)


def test_it_is_the_prior_whatever_x_and_t() -> None:
    table, condition = router([[6, 2, 1], [1, 1, 4], [7, 3, 5]]), Condition(torch.tensor([0, 1, -1]))
    expected = table.prior_logits(condition).float()
    for t in (0.0, 0.5, 1.0):
        said = table.logits(torch.randn(3, 5), torch.full((3,), t), condition)
        torch.testing.assert_close(said, expected - expected.logsumexp(-1, keepdim=True))


def test_what_a_class_was_never_seen_in_is_improbable_but_possible() -> None:
    """Three of four samples of all are in cluster 0; class 1 has one sample, in cluster 1."""
    counts = torch.tensor([[3, 0], [0, 1], [0, 0], [3, 1]], dtype=torch.float64)
    expected = [[1, 0.25 / 4], [0.75 / 2, 1], [0.75, 0.25], [0.75, 0.25]]
    torch.testing.assert_close(log_prior(counts).exp(), torch.tensor(expected, dtype=torch.float64))


def test_it_has_no_parameters() -> None:
    assert not list(router([[1, 1]]).model.parameters())


def test_it_differs_from_the_prior_by_at_most_what_is_improbable() -> None:
    table, condition = router([[600, 0, 0], [200, 200, 200], [800, 200, 200]]), Condition(torch.tensor([0]))
    said = table.logits(torch.zeros(1, 2), torch.zeros(1), condition).softmax(-1)
    prior = table.prior_logits(condition).softmax(-1)
    assert (said - prior).abs().sum().item() / 2 == pytest.approx(0, abs=1 / 601)
