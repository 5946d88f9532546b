import shutil

import pytest
import torch
from safetensors.torch import load_file

from experts.architectures.residual_mlp import ResidualMLP
from experts.config import TrainingConfig
from experts.training.checkpoint import (
    CheckpointError,
    DamagedCheckpoint,
    TrainingState,
    restore_checkpoint,
    save_checkpoint,
)
from experts.training.ema import MovingAverage


def started(width=8, lr=1e-3, device="cpu"):
    model = ResidualMLP(latent_shape=[3], num_classes=2, width=width, depth=1)
    return TrainingState(
        config=TrainingConfig(lr=lr, device=device),
        model=model,
        average=MovingAverage(model, 0.1),
        optimizer=torch.optim.AdamW(model.parameters(), fused=True),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )


def trained(steps=3):
    state = started()
    for _ in range(steps):
        state.optimizer.zero_grad()
        state.model(torch.randn(4, 3), torch.rand(4), torch.zeros(4, dtype=torch.int64)).sub(
            1
        ).square().sum().backward()
        state.optimizer.step()
        state.step += 1
        state.average.update(state.step)
    state.rows, state.sums = [{"step": 2, "loss": 0.1}], {"loss": torch.tensor(0.25)}
    return state


def test_everything_comes_back(tmp_path):
    state, other = trained(), started()
    save_checkpoint(tmp_path, state)
    assert restore_checkpoint(tmp_path, other)
    assert (other.step, other.rows, other.sums) == (3, state.rows, state.sums)
    save_checkpoint(tmp_path / "again", other)
    first = load_file(tmp_path / "step-00000003" / "state.safetensors")
    second = load_file(tmp_path / "again" / "step-00000003" / "state.safetensors")
    assert set(first) == set(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    kinds = {name.split(".")[0] for name in first}
    assert kinds == {"model", "average", "optimizer", "sums"}


def test_without_a_checkpoint_nothing_happens(tmp_path):
    state = started()
    assert not restore_checkpoint(tmp_path, state)
    assert state.step == 0


def test_only_the_newest_is_kept_and_leftovers_go(tmp_path):
    (tmp_path / ".step-00000001.123").mkdir(parents=True)
    save_checkpoint(tmp_path, trained(1))
    save_checkpoint(tmp_path, trained(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_an_unfinished_copy_is_never_read(tmp_path):
    save_checkpoint(tmp_path, trained(2))
    (tmp_path / ".step-00000009.123").mkdir()
    state = started()
    restore_checkpoint(tmp_path, state)
    assert state.step == 2


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_a_broken_checkpoint_is_set_aside_and_the_training_begins_anew(name, damage, tmp_path):
    save_checkpoint(tmp_path, trained())
    path = tmp_path / "step-00000003" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] + (b"" if damage == "truncated" else b"\xff" * 300))
    with pytest.raises(DamagedCheckpoint, match="renamed to damaged-step-00000003"):
        restore_checkpoint(tmp_path, started())
    assert [path.name for path in tmp_path.iterdir()] == ["damaged-step-00000003"]
    state = started()
    assert not restore_checkpoint(tmp_path, state)
    save_checkpoint(tmp_path, trained(4))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_a_checkpoint_that_is_damaged_twice_is_set_aside_twice(tmp_path):
    for _ in range(2):
        save_checkpoint(tmp_path / "new", trained())
        shutil.copytree(tmp_path / "new", tmp_path / "all", dirs_exist_ok=True)
        (tmp_path / "all" / "step-00000003" / "state.json").write_text("{}")
        with pytest.raises(DamagedCheckpoint):
            restore_checkpoint(tmp_path / "all", started())
    assert [path.name for path in (tmp_path / "all").iterdir()] == ["damaged-step-00000003"]


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    save_checkpoint(tmp_path, trained())
    with pytest.raises(CheckpointError, match="another network"):
        restore_checkpoint(tmp_path, started(width=9))


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    save_checkpoint(tmp_path, trained())
    with pytest.raises(CheckpointError, match="another training configuration"):
        restore_checkpoint(tmp_path, started(lr=2e-3))


def test_a_training_may_go_on_on_another_device(tmp_path):
    save_checkpoint(tmp_path, trained())
    assert restore_checkpoint(tmp_path, started(device="cuda"))
