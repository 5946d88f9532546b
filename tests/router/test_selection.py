import itertools
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from router.config import SelectionConfig, SelectionName, selection_label
from router.selection import SELECTIONS, get_selection, maximal_coupling

LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.05, 0.1, 0.8]], dtype=torch.float64).log()
T = torch.tensor([0.9, 0.1], dtype=torch.float64)


def compute_gates(logits: Tensor = LOGITS, t: Tensor = T, uniforms: Tensor | None = None, **settings: object) -> Tensor:
    config = SelectionConfig(**settings)
    rule = SELECTIONS[config.name]
    if uniforms is None:
        uniforms = torch.full((len(logits), rule.draws(config)), 0.5, dtype=torch.float64)
    return rule.gates(logits, t, uniforms, config)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"name": "full"}, [[0.5, 0.3, 0.15, 0.05], [0.05, 0.05, 0.1, 0.8]]),
        ({"name": "top_k", "k": 1}, [[1, 0, 0, 0], [0, 0, 0, 1]]),
        ({"name": "top_k", "k": 2}, [[0.625, 0.375, 0, 0], [0, 0, 1 / 9, 8 / 9]]),
        ({"name": "threshold", "probability": 0.12}, [[10 / 19, 6 / 19, 3 / 19, 0], [0, 0, 0, 1]]),
        ({"name": "nucleus", "total": 0.79}, [[0.625, 0.375, 0, 0], [0, 0, 0, 1]]),
        ({"name": "nucleus", "total": 0.81}, [[10 / 19, 6 / 19, 3 / 19, 0], [0, 0, 1 / 9, 8 / 9]]),
        ({"name": "full_then_top1", "t_switch": 0.5}, [[0.5, 0.3, 0.15, 0.05], [0, 0, 0, 1]]),
        ({"name": "threshold_then_top1", "probability": 0.2}, [[0.625, 0.375, 0, 0], [0, 0, 0, 1]]),
        ({"name": "threshold_then_top1", "t_switch": 0.95}, [[1, 0, 0, 0], [0, 0, 0, 1]]),
        ({"name": "full_then_sticky"}, [[0.5, 0.3, 0.15, 0.05], [0, 0, 0, 1]]),
        ({"name": "sticky_resample"}, [[0, 1, 0, 0], [0, 0, 0, 1]]),
        ({"name": "sample"}, [[0, 1, 0, 0], [0, 0, 0, 1]]),
        ({"name": "sticky"}, [[0, 1, 0, 0], [0, 0, 0, 1]]),
    ],
)
def test_gates_match_examples(settings: dict[str, object], expected: list[list[float]]) -> None:
    torch.testing.assert_close(
        compute_gates(**settings), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_threshold_above_every_probability_keeps_the_best() -> None:
    assert compute_gates(name="threshold", probability=0.95).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


def test_selections_that_draw_from_prior_are_sticky() -> None:
    assert [name for name, rule in SELECTIONS.items() if rule.draws_from_prior] == [
        "sticky",
        "sticky_resample",
        "coupled_resample",
    ]


def test_auto_selection_raises_and_names_the_remedy() -> None:
    assert set(SELECTIONS) == set(get_args(SelectionName))
    with pytest.raises(ValueError, match=r"selection_choice.json; .* one of full, .* coupled_resample"):
        get_selection(SelectionConfig(name="auto"))


def test_selection_label_has_every_number_it_depends_on() -> None:
    """Two configurations of the same name share a table row, so they must give the same gates."""
    changes = {"k": 2, "probability": 0.2, "total": 0.6, "draws": 2, "t_switch": 0.95}
    for name, (key, value) in itertools.product(SELECTIONS, changes.items()):
        plain, changed = SelectionConfig(name=name), SelectionConfig(**{"name": name, key: value})
        is_same = torch.equal(compute_gates(name=name), compute_gates(**{"name": name, key: value}))
        if selection_label(plain) == selection_label(changed):
            assert is_same and evaluate_rules(plain) == evaluate_rules(changed), (name, key)


def evaluate_rules(config: SelectionConfig) -> list[bool]:
    rule = SELECTIONS[config.name]
    return [*rule.queries_router(T, config).tolist(), *rule.freezes_gates(T, config).tolist(), rule.draws(config) == 1]


def test_draws_follow_the_softmax() -> None:
    uniforms = torch.rand(40_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gates = compute_gates(LOGITS[:1].expand(40_000, -1), torch.ones(40_000), uniforms, name="sample")
    torch.testing.assert_close(gates.mean(0), LOGITS[0].exp(), atol=0.01, rtol=0)


def test_several_draws_share_the_gates() -> None:
    uniforms = torch.tensor([[0.1, 0.2, 0.6, 0.99]], dtype=torch.float64)
    gates = compute_gates(LOGITS[:1], T[:1], uniforms, name="sample", draws=4)
    assert gates.tolist() == [[0.5, 0.25, 0, 0.25]]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_impossible_expert_is_never_drawn(uniform: float) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    gates = compute_gates(logits, T[:1], torch.tensor([[uniform]], dtype=torch.float64), name="sample")
    assert gates[0, [0, 3]].tolist() == [0, 0]
    assert gates.sum() == 1


@st.composite
def distribution_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Generate two distributions over the same few experts, with zero probabilities in either."""
    num_experts = draw(st.integers(1, 6))
    parts = st.lists(st.integers(0, 9), min_size=num_experts, max_size=num_experts).filter(any)
    before, now = (torch.tensor(draw(parts), dtype=torch.float64) for _ in range(2))
    return before / before.sum(), now / now.sum()


@settings(deadline=None)
@given(distribution_pairs())
def test_maximal_coupling_has_target_law_and_fewest_changes(distributions: tuple[Tensor, Tensor]) -> None:
    """In closed form: average the next expert's distribution over every possible previous expert."""
    before, now = distributions
    possible = before > 0
    drawn = torch.eye(len(before), dtype=torch.float64)[possible]
    conditional = maximal_coupling(before.expand(len(drawn), -1), drawn, now.expand(len(drawn), -1))
    assert (conditional >= 0).all()
    torch.testing.assert_close(conditional.sum(1), torch.ones(len(drawn), dtype=torch.float64))
    torch.testing.assert_close(before[possible] @ conditional, now)
    changes = 1 - (before[possible] * (conditional * drawn).sum(1)).sum()
    torch.testing.assert_close(changes, (before - now).abs().sum() / 2, atol=1e-12, rtol=0)
