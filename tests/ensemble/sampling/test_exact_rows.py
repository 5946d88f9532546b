import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ensemble.sampling.exact_rows import SIZES, ExactExpert, call_rows, find_row_counts
from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from tests.ensemble.pipelines.conftest import make_expert


def by_size(inputs: torch.Tensor, wrong_from: int):
    """Return a call whose bits change with the number of rows at `wrong_from`."""
    return lambda rows: inputs[rows] + (1 if len(rows) >= wrong_from else 0)


@given(st.integers(1, 70), st.integers(1, 6))
def test_rows_are_evaluated_once_in_calls_of_known_sizes(count, known):
    sizes, evaluated = SIZES[:known], []

    def call(rows):
        assert len(rows) in sizes
        evaluated.append(rows.tolist())
        return 10.0 * rows

    result = call_rows(call, torch.arange(count), sizes)
    assert result.tolist() == [10.0 * row for row in range(count)]
    assert len(evaluated) == -(-count // sizes[-1])


def test_sizes_are_found_up_to_the_first_with_other_bits():
    inputs = torch.randn(64)
    assert find_row_counts(by_size(inputs, 1000), 64) == SIZES[: SIZES.index(64) + 1]
    assert find_row_counts(by_size(inputs, 16), 64) == (4, 8, 12)


def test_rows_that_depend_on_each_other_have_no_size():
    inputs = torch.randn(16, 3)
    assert find_row_counts(lambda rows: inputs[rows] - inputs[rows].mean(0), 16) == ()


def test_a_matrix_product_has_equal_rows_in_every_call():
    torch.manual_seed(0)
    layer, inputs = nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 64)), torch.randn(64, 512)
    with torch.no_grad():
        sizes = find_row_counts(lambda rows: layer(inputs[rows]), 64)
        whole = call_rows(lambda rows: layer(inputs[rows]), torch.arange(64), sizes)
        for count in (1, 2, 5, 16, 33):
            some = torch.randperm(64)[:count]
            assert torch.equal(call_rows(lambda rows: layer(inputs[rows]), some, sizes), whole[some])


def test_an_expert_has_the_velocity_of_the_one_that_it_wraps():
    expert = make_expert(0)
    exact = ExactExpert.measure(expert, RECTIFIED_FLOW, 16)
    noised, t, condition = torch.randn(7, 1, 4, 4), torch.full((7,), 0.3), Condition.of_classes([0, 1, -1, 0, 1, -1, 0])
    plain = expert.velocity(noised, t, condition, RECTIFIED_FLOW)
    assert torch.allclose(exact.velocity(noised, t, condition, RECTIFIED_FLOW), plain, atol=1e-6)
    rows = [exact.velocity(noised[i : i + 1], t[:1], condition.rows(slice(i, i + 1)), RECTIFIED_FLOW) for i in range(7)]
    assert torch.equal(torch.cat(rows), exact.velocity(noised, t, condition, RECTIFIED_FLOW))
