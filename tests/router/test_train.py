from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddm_core.artifacts import Workspace, list_files, read_json
from experts.conditions.condition import Condition
from experts.config import TrainingConfig
from router.config import RouterConfig
from router.costs import training_cost
from router.models.registry import ROUTERS
from router.router import Router
from router.train import router_flops, train_router


def config(kind: str = "mlp", steps: int = 60) -> RouterConfig:
    training = TrainingConfig(steps=steps, batch_size=32, lr=3e-3, warmup_steps=5, t_std=1.4, log_every=20)
    return RouterConfig(kind=kind, width=16, depth=1, heads=2, tokens=4, training=training)


@pytest.mark.parametrize("kind", ["mlp", "transformer", "nearest_centroid", "density_ratio"])
def test_training_separates_clusters_and_reports_quality(
    kind: str, clusters: list[Path], holdouts: list[Path], codec: Path, workspace: Workspace, tmp_path: Path
) -> None:
    router_config = config(kind, steps=180 if kind == "density_ratio" else 60)
    summary = train_router(router_config, clusters, codec, holdouts, tmp_path / "router", workspace)
    quality = read_json(tmp_path / "router" / "quality.json")
    assert len(quality["bins"]) == 10
    assert quality["bins"][0]["accuracy"] > 0.95
    assert quality["bins"][0]["accuracy_null"] > 0.95
    assert quality["bins"][0]["cross_entropy"] < quality["prior_entropy"]
    assert quality["largest_share_null"] == 0.75
    assert quality["images"] == 20
    assert summary.flops > 0
    assert summary.images == 120
    rows = (tmp_path / "router" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == (0 if kind == "nearest_centroid" else router_config.training.steps // 20)


@pytest.mark.parametrize("kind", list(ROUTERS))
def test_every_kind_loads_as_trained(
    kind: str, clusters: list[Path], holdouts: list[Path], codec: Path, workspace: Workspace, tmp_path: Path
) -> None:
    train_router(config(kind, steps=2), clusters, codec, holdouts, tmp_path / "router", workspace)
    router = Router.load(tmp_path / "router")
    router.save(tmp_path / "again")
    for file in list_files(tmp_path / "again"):
        assert file.read_bytes() == (tmp_path / "router" / file.name).read_bytes(), file.name
    assert (router.temperatures != 1).any() == (kind not in ("prior_table", "density"))
    noised, t, condition = (
        torch.randn(4, 1, 4, 4),
        torch.tensor([0, 0.3, 0.9, 1]),
        Condition(torch.tensor([0, 1, -1, 0])),
    )
    again = Router.load(tmp_path / "again")
    assert torch.equal(again.logits(noised, t, condition), router.logits(noised, t, condition))


def test_training_without_calibration_has_unit_temperatures(
    clusters: list[Path], holdouts: list[Path], codec: Path, workspace: Workspace, tmp_path: Path
) -> None:
    uncalibrated = replace(config(steps=20), calibrate=False)
    summary = train_router(uncalibrated, clusters, codec, holdouts, tmp_path / "router", workspace)
    assert (Router.load(tmp_path / "router").temperatures == 1).all()
    for row in summary.quality.bins:
        assert row.cross_entropy == row.cross_entropy_before
        assert row.calibration_error_null == row.calibration_error_before_null


def test_prior_counts_every_sample(
    clusters: list[Path], holdouts: list[Path], codec: Path, workspace: Workspace, tmp_path: Path
) -> None:
    train_router(config(steps=1), clusters, codec, holdouts, tmp_path / "router", workspace)
    router = Router.load(tmp_path / "router")
    assert router.prior_counts.tolist() == [[60, 10], [30, 20], [90, 30]]
    prior = router.prior_logits(Condition.null(1)).softmax(-1)
    torch.testing.assert_close(prior, torch.tensor([[0.75, 0.25]], dtype=torch.float64))


def test_training_is_byte_identical_when_repeated(
    clusters: list[Path], holdouts: list[Path], codec: Path, tmp_path: Path
) -> None:
    for name in ("first", "second"):
        workspace = Workspace.at(tmp_path / f"work_{name}")
        train_router(config(steps=5), clusters, codec, holdouts, tmp_path / name, workspace)
    for file in list_files(tmp_path / "first"):
        assert file.read_bytes() == (tmp_path / "second" / file.relative_to(tmp_path / "first")).read_bytes(), file.name


def test_cluster_without_holdout_raises(
    clusters: list[Path], codec: Path, workspace: Workspace, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="2 clusters, 0 holdouts"):
        train_router(config(), clusters, codec, [], tmp_path / "router", workspace)


@pytest.mark.parametrize("kind", list(ROUTERS))
def test_router_flops_equal_those_of_the_training(
    kind: str, clusters: list[Path], holdouts: list[Path], codec: Path, workspace: Workspace, tmp_path: Path
) -> None:
    summary = train_router(config(kind, steps=2), clusters, codec, holdouts, tmp_path / "router", workspace)
    assert router_flops(config(kind, steps=2), (1, 4, 4), 2, 2) == summary.flops
    assert (summary.flops > 0) == (kind not in ("prior_table", "density"))


def test_all_heads_cost_as_much_as_one_network() -> None:
    heads = replace(config("density_ratio"), calibrate=False)
    row = training_cost(heads, 1.0, 4)
    assert row == training_cost(replace(heads, kind="mlp"), 1.0, 4) / 4 == 3 * 8 * 60
    assert training_cost(config("mlp"), 1.0, 4) == 3 * 32 * 60 + 2 * 10 * 2048
