from pathlib import Path

import pytest
import torch

from ddm_core.artifacts import CorruptArtifact, UnfinishedArtifact, read_json, write_json
from experts.conditions.condition import Condition
from experts.diffusion.noise_schedule import COSINE
from router.config import RouterConfig
from router.models.registry import build_router
from router.router import Router, count_priors

COUNTS = torch.tensor([[6, 2, 0], [0, 0, 0], [0, 0, 4], [10, 4, 6]], dtype=torch.float64)
"""Three classes, of which the second has no sample, three clusters, and eight samples without a class."""


def make_router(kind: str = "mlp") -> Router:
    torch.manual_seed(0)
    model = build_router(RouterConfig(kind=kind, width=16, heads=2, tokens=3), (5,), 3, 3)
    torch.nn.init.normal_(model.head.weight)
    temperatures = torch.linspace(0.5, 3, 20, dtype=torch.float64).reshape(2, 10)
    return Router(model=model.eval(), noise_schedule=COSINE, prior_counts=COUNTS, temperatures=temperatures)


@pytest.mark.parametrize(
    ("class_id", "present", "expected"),
    [
        (-1, None, [0.5, 0.2, 0.3]),
        (0, None, [0.75, 0.25, 0]),
        (1, None, [0.5, 0.2, 0.3]),
        (2, None, [0, 0, 1]),
        (0, [False, True, True], [0, 1, 0]),
        (2, [True, True, False], [10 / 14, 4 / 14, 0]),
    ],
)
def test_prior_matches_examples(class_id: int, present: list[bool] | None, expected: list[float]) -> None:
    mask = None if present is None else torch.tensor(present)
    prior = make_router().prior_logits(Condition(torch.tensor([class_id])), mask).softmax(-1)
    torch.testing.assert_close(prior, torch.tensor([expected], dtype=torch.float64))


def test_count_priors_matches_example() -> None:
    cluster_id, class_id = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([1, 1, 0, -1, -1])
    assert count_priors(cluster_id, class_id, 4, 2).tolist() == [[0, 1, 0, 0], [2, 0, 0, 0], [2, 2, 1, 0]]


def test_null_condition_is_the_row_after_all_classes() -> None:
    router, noised, t = make_router(), torch.randn(1, 5), torch.tensor([0.3])
    logits = router.uncalibrated_logits(noised, t, Condition.null(1))
    assert torch.equal(logits, router.model(noised, t, torch.tensor([3])))


def test_logits_are_divided_by_the_temperature() -> None:
    router, noised, t = make_router(), torch.randn(2, 5), torch.tensor([0.05, 0.95])
    condition = Condition(torch.tensor([0, -1]))
    ratio = router.uncalibrated_logits(noised, t, condition) / router.logits(noised, t, condition)
    torch.testing.assert_close(ratio, torch.tensor([[0.5], [3.0]]).expand(2, 3))


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_router_save_load_round_trip(kind: str, tmp_path: Path) -> None:
    router = make_router(kind)
    router.save(tmp_path / "router")
    loaded = Router.load(tmp_path / "router")
    noised, t, condition = torch.randn(4, 5), torch.rand(4), Condition(torch.tensor([0, 1, 2, -1]))
    assert torch.equal(loaded.logits(noised, t, condition), router.logits(noised, t, condition))
    assert torch.equal(loaded.prior_logits(condition), router.prior_logits(condition))
    assert torch.equal(loaded.temperatures, router.temperatures)
    assert (loaded.noise_schedule.name, loaded.num_experts, loaded.num_classes) == ("cosine", 3, 3)


def test_load_without_settings_is_unfinished(tmp_path: Path) -> None:
    with pytest.raises(UnfinishedArtifact, match=r"router\.json"):
        Router.load(tmp_path)


@pytest.mark.parametrize(
    "broken",
    [
        {"kind": "oracle"},
        {"noise_schedule": "curly"},
        {"prior_counts": "many"},
        {"temperatures": [1, 2]},
        {"temperatures": [[1.0] * 10, [0.0] * 10]},
    ],
)
def test_settings_of_other_version_raise(broken: dict[str, str], tmp_path: Path) -> None:
    make_router().save(tmp_path / "router")
    file = tmp_path / "router" / "router.json"
    write_json(file, read_json(file) | broken)
    with pytest.raises(CorruptArtifact, match="another version"):
        Router.load(tmp_path / "router")


def test_settings_without_temperatures_raise(tmp_path: Path) -> None:
    make_router().save(tmp_path / "router")
    file = tmp_path / "router" / "router.json"
    settings = read_json(file)
    del settings["temperatures"]
    write_json(file, settings)
    with pytest.raises(CorruptArtifact, match="another version.*temperatures"):
        Router.load(tmp_path / "router")
