from pathlib import Path

import pytest
import torch

from ddm_core.artifacts import Workspace, list_files
from experts.conditions.condition import Condition
from experts.config import TrainingConfig
from router.add_remove import RouterChangeError, add_expert, remove_expert, remove_head
from router.config import RouterConfig
from router.router import Router
from router.train import train_router
from tests.router.conftest import write_cluster

TRAINING = TrainingConfig(steps=20, batch_size=16, lr=3e-3, warmup_steps=5, t_std=1.4, log_every=10)
CONFIG = RouterConfig(kind="density_ratio", width=16, depth=1, training=TRAINING)


@pytest.fixture
def folder(clusters: list[Path], holdouts: list[Path], codec: Path, tmp_path: Path) -> Path:
    train_router(CONFIG, clusters, codec, holdouts, tmp_path / "router", Workspace.at(tmp_path / "training"))
    return tmp_path / "router"


@pytest.fixture
def extended(folder: Path, clusters: list[Path], codec: Path, workspace: Workspace, tmp_path: Path) -> Path:
    grey = write_cluster(tmp_path / "grey", 30, 130, 4)
    flops = add_expert(folder, grey, clusters, codec, TRAINING, tmp_path / "extended", workspace)
    assert flops > 0
    return tmp_path / "extended"


def model_files(folder: Path) -> dict[str, bytes]:
    names = ("router.json", "config.json", "diffusion_pytorch_model.safetensors")
    return {file.name: file.read_bytes() for file in list_files(folder) if file.name in names}


def test_add_then_remove_is_byte_identical(folder: Path, extended: Path, tmp_path: Path) -> None:
    remove_expert(extended, 2, tmp_path / "back")
    before, after = model_files(folder), model_files(tmp_path / "back")
    assert len(before) == 3
    assert before == after
    assert model_files(extended) != before


def test_add_expert_keeps_other_heads_and_extends_prior(folder: Path, extended: Path) -> None:
    before, after = Router.load(folder), Router.load(extended)
    for old, new in zip(before.model.heads, after.model.heads, strict=False):
        assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.state_dict().items())
    assert after.prior_counts.tolist() == [[60, 10, 10], [30, 20, 20], [90, 30, 30]]
    assert torch.equal(after.temperatures, before.temperatures)
    assert any(parameter.any() for parameter in after.model.heads[2].head.parameters())


def test_remove_head_renormalizes_the_other_experts(extended: Path) -> None:
    router = Router.load(extended)
    reduced = remove_head(router, 0)
    noised, t, condition = torch.randn(5, 1, 4, 4), torch.rand(5), Condition(torch.tensor([0, 1, -1, 0, 1]))
    expected = router.logits(noised, t, condition)[:, [1, 2]].softmax(-1)
    torch.testing.assert_close(reduced.logits(noised, t, condition).softmax(-1), expected)


def test_added_head_is_independent_of_other_additions(
    extended: Path, clusters: list[Path], codec: Path, tmp_path: Path, folder: Path
) -> None:
    second = tmp_path / "second"
    add_expert(folder, tmp_path / "grey", clusters, codec, TRAINING, second, Workspace.at(tmp_path / "other"))
    assert model_files(second) == model_files(extended)


@pytest.mark.parametrize("expert_id", [-1, 2])
def test_remove_of_unknown_expert_raises(folder: Path, tmp_path: Path, expert_id: int) -> None:
    with pytest.raises(RouterChangeError, match=rf"0 \.\.\. 1.*got {expert_id}"):
        remove_expert(folder, expert_id, tmp_path / "out")


def test_remove_of_last_expert_raises(folder: Path) -> None:
    with pytest.raises(RouterChangeError, match="not the last one"):
        remove_head(remove_head(Router.load(folder), 0), 0)


def test_remove_from_single_network_router_raises(
    clusters: list[Path], holdouts: list[Path], codec: Path, workspace: Workspace, tmp_path: Path
) -> None:
    config = RouterConfig(width=8, depth=1, training=TRAINING)
    train_router(config, clusters, codec, holdouts, tmp_path / "mlp", workspace)
    with pytest.raises(RouterChangeError, match="router=density_ratio"):
        remove_expert(tmp_path / "mlp", 0, tmp_path / "out")
