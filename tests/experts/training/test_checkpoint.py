import shutil

import pytest
import torch
from safetensors.torch import load_file

from ddm_core.artifacts import read_with_checksum, write_record
from experts.architectures.residual_mlp import ResidualMLP
from experts.config import TrainingConfig
from experts.training.checkpoint import (
    CheckpointError,
    DamagedCheckpoint,
    TrainingState,
    restore_checkpoint,
    save_checkpoint,
)
from experts.training.optimizers.ema import MovingAverage


def create_state(width=8, lr=1e-3, device="cpu"):
    model = ResidualMLP(latent_shape=[3], num_classes=2, width=width, depth=1)
    return TrainingState(
        config=TrainingConfig(lr=lr, device=device),
        model=model,
        average=MovingAverage(model, 0.1),
        optimizer=torch.optim.AdamW(model.parameters(), fused=True),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )


def create_trained_state(steps=3):
    state = create_state()
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


def test_checkpoint_restores_the_full_state(tmp_path):
    state, other = create_trained_state(), create_state()
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


def test_restore_without_checkpoint_returns_false(tmp_path):
    state = create_state()
    assert not restore_checkpoint(tmp_path, state)
    assert state.step == 0


def test_only_the_newest_checkpoint_is_stored(tmp_path):
    (tmp_path / ".step-00000001.123").mkdir(parents=True)
    save_checkpoint(tmp_path, create_trained_state(1))
    save_checkpoint(tmp_path, create_trained_state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_unfinished_checkpoint_is_never_read(tmp_path):
    save_checkpoint(tmp_path, create_trained_state(2))
    (tmp_path / ".step-00000009.123").mkdir()
    state = create_state()
    restore_checkpoint(tmp_path, state)
    assert state.step == 2


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_damaged_checkpoint_is_renamed_and_training_restarts(name, damage, tmp_path):
    save_checkpoint(tmp_path, create_trained_state())
    path = tmp_path / "step-00000003" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] + (b"" if damage == "truncated" else b"\xff" * 300))
    with pytest.raises(DamagedCheckpoint, match="renamed to damaged-step-00000003"):
        restore_checkpoint(tmp_path, create_state())
    assert [path.name for path in tmp_path.iterdir()] == ["damaged-step-00000003"]
    state = create_state()
    assert not restore_checkpoint(tmp_path, state)
    save_checkpoint(tmp_path, create_trained_state(4))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_checkpoint_damaged_twice_is_renamed_twice(tmp_path):
    for _ in range(2):
        save_checkpoint(tmp_path / "new", create_trained_state())
        shutil.copytree(tmp_path / "new", tmp_path / "all", dirs_exist_ok=True)
        (tmp_path / "all" / "step-00000003" / "state.json").write_text("{}")
        with pytest.raises(DamagedCheckpoint):
            restore_checkpoint(tmp_path / "all", create_state())
    assert [path.name for path in (tmp_path / "all").iterdir()] == ["damaged-step-00000003"]


def test_checkpoint_of_another_network_is_refused(tmp_path):
    save_checkpoint(tmp_path, create_trained_state())
    with pytest.raises(CheckpointError, match="another network"):
        restore_checkpoint(tmp_path, create_state(width=9))


def test_checkpoint_of_another_configuration_is_refused(tmp_path):
    save_checkpoint(tmp_path, create_trained_state())
    with pytest.raises(CheckpointError, match="another training configuration"):
        restore_checkpoint(tmp_path, create_state(lr=2e-3))


def test_checkpoint_from_before_a_field_has_its_default(tmp_path):
    save_checkpoint(tmp_path, create_trained_state())
    path = tmp_path / "step-00000003" / "state.json"
    content = read_with_checksum(path)
    for name in ("optimizer", "betas", "momentum", "lr_schedule", "decay_share"):
        del content["config"][name]
    write_record(path, content)
    assert restore_checkpoint(tmp_path, create_state())


def test_training_can_resume_on_another_device(tmp_path):
    save_checkpoint(tmp_path, create_trained_state())
    assert restore_checkpoint(tmp_path, create_state(device="cuda"))
