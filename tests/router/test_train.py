from pathlib import Path

import pytest
import torch

from artifacts import Workspace, files_in, read_json
from experts.condition import Condition
from experts.config import TrainingConfig
from router.config import RouterConfig
from router.router import Router
from router.train import router_flops, train_router


def config(kind: str = "mlp", steps: int = 60) -> RouterConfig:
    training = TrainingConfig(steps=steps, batch_size=32, lr=3e-3, warmup_steps=5, t_std=1.4, log_every=20)
    return RouterConfig(kind=kind, width=16, depth=1, heads=2, tokens=4, training=training)


@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_it_learns_the_clusters_and_says_how_well(
    kind: str, clusters: list[Path], holdouts: list[Path], codec: Path, workspace: Workspace, tmp_path: Path
) -> None:
    summary = train_router(config(kind), clusters, codec, holdouts, tmp_path / "router", workspace)
    quality = read_json(tmp_path / "router" / "quality.json")
    assert len(quality["bins"]) == 10
    assert quality["bins"][0]["accuracy"] > 0.95
    assert quality["bins"][0]["accuracy_null"] > 0.95
    assert quality["bins"][0]["cross_entropy"] < quality["prior_entropy"]
    assert quality["largest_share_null"] == 0.75
    assert quality["images"] == 40
    assert summary.flops > 0
    assert summary.images == 120
    rows = (tmp_path / "router" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 3


def test_the_prior_counts_every_sample(
    clusters: list[Path], holdouts: list[Path], codec: Path, workspace: Workspace, tmp_path: Path
) -> None:
    train_router(config(steps=1), clusters, codec, holdouts, tmp_path / "router", workspace)
    router = Router.load(tmp_path / "router")
    assert router.prior_counts.tolist() == [[60, 10], [30, 20], [90, 30]]
    prior = router.prior_logits(Condition.null(1)).softmax(-1)
    torch.testing.assert_close(prior, torch.tensor([[0.75, 0.25]], dtype=torch.float64))


def test_trained_twice_it_is_the_same_to_the_byte(
    clusters: list[Path], holdouts: list[Path], codec: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        workspace = Workspace.at(tmp_path / f"work_{name}")
        train_router(config(steps=5), clusters, codec, holdouts, tmp_path / name, workspace)
    for file in files_in(tmp_path / "one"):
        assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes(), file.name


def test_every_cluster_needs_its_holdout(
    clusters: list[Path], codec: Path, workspace: Workspace, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="2 clusters, 0 holdouts"):
        train_router(config(), clusters, codec, [], tmp_path / "router", workspace)


def test_flops_are_known_before_training(
    clusters: list[Path], holdouts: list[Path], codec: Path, workspace: Workspace, tmp_path: Path
) -> None:
    summary = train_router(config(steps=2), clusters, codec, holdouts, tmp_path / "router", workspace)
    assert router_flops(config(steps=2), (1, 4, 4), 2, 2) == summary.flops > 0
