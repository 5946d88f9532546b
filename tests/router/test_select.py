import pytest
import torch
from torch import Tensor

from router.config import SelectionConfig
from router.select import SELECTIONS

LOGITS = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.05, 0.1, 0.8]], dtype=torch.float64).log()
T = torch.tensor([0.9, 0.1], dtype=torch.float64)


def gates_of(logits: Tensor = LOGITS, t: Tensor = T, uniforms: Tensor | None = None, **chosen: object) -> Tensor:
    config = SelectionConfig(**chosen)
    rule = SELECTIONS[config.name]
    if uniforms is None:
        uniforms = torch.full((len(logits), rule.draws(config)), 0.5, dtype=torch.float64)
    return rule.gates(logits, t, uniforms, config)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"name": "full"}, [[0.5, 0.3, 0.15, 0.05], [0.05, 0.05, 0.1, 0.8]]),
        ({"name": "top_k", "k": 1}, [[1, 0, 0, 0], [0, 0, 0, 1]]),
        ({"name": "top_k", "k": 2}, [[0.625, 0.375, 0, 0], [0, 0, 1 / 9, 8 / 9]]),
        ({"name": "threshold", "probability": 0.12}, [[10 / 19, 6 / 19, 3 / 19, 0], [0, 0, 0, 1]]),
        ({"name": "nucleus", "total": 0.79}, [[0.625, 0.375, 0, 0], [0, 0, 0, 1]]),
        ({"name": "nucleus", "total": 0.81}, [[10 / 19, 6 / 19, 3 / 19, 0], [0, 0, 1 / 9, 8 / 9]]),
        ({"name": "anneal", "t_switch": 0.5}, [[0.5, 0.3, 0.15, 0.05], [0, 0, 0, 1]]),
        ({"name": "sample"}, [[0, 1, 0, 0], [0, 0, 0, 1]]),
        ({"name": "sticky"}, [[0, 1, 0, 0], [0, 0, 0, 1]]),
    ],
)
def test_gates_worked_out_by_hand(chosen: dict[str, object], expected: list[list[float]]) -> None:
    torch.testing.assert_close(gates_of(**chosen), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_threshold_above_every_probability_keeps_the_best() -> None:
    assert gates_of(name="threshold", probability=0.95).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]


def test_only_sticky_is_pinned() -> None:
    assert [name for name, rule in SELECTIONS.items() if rule.pinned] == ["sticky"]


def test_draws_follow_the_softmax() -> None:
    uniforms = torch.rand(40_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gates = gates_of(LOGITS[:1].expand(40_000, -1), torch.ones(40_000), uniforms, name="sample")
    torch.testing.assert_close(gates.mean(0), LOGITS[0].exp(), atol=0.01, rtol=0)


def test_several_draws_share_the_gates() -> None:
    uniforms = torch.tensor([[0.1, 0.2, 0.6, 0.99]], dtype=torch.float64)
    gates = gates_of(LOGITS[:1], T[:1], uniforms, name="sample", draws=4)
    assert gates.tolist() == [[0.5, 0.25, 0, 0.25]]


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_an_impossible_expert_is_never_drawn(uniform: float) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    gates = gates_of(logits, T[:1], torch.tensor([[uniform]], dtype=torch.float64), name="sample")
    assert gates[0, [0, 3]].tolist() == [0, 0]
    assert gates.sum() == 1
