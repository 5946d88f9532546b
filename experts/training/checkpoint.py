"""Everything that is needed to continue a training bit for bit, and nothing that can be derived.

    checkpoints/step-00000500/state.safetensors   parameters, average, optimiser, sums since the last row
                              state.json          step, metrics rows, configuration, checksums; written last

A new checkpoint is whole before the one before it goes, and at most one is kept. One that was damaged on the disk is
set aside and reported; the training then begins anew and comes to the same bits.
"""

import contextlib
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddm_core.artifacts import (
    ArtifactError,
    atomic_folder,
    checksum,
    read_with_checksum,
    to_jsonable,
    with_checksum,
    write_text,
)
from experts.config import TrainingConfig
from experts.training.ema import MovingAverage

logger = logging.getLogger(__name__)

MetricsRow = dict[str, int | float]

STATE, TENSORS = "state.json", "state.safetensors"


class CheckpointError(Exception):
    """A checkpoint cannot be continued from."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint was not as it was written, and has been set aside: started again, the training begins anew."""


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """A training between two steps."""

    config: TrainingConfig
    model: nn.Module
    average: MovingAverage
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    """Steps that are done."""
    rows: list[MetricsRow] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Sums of the metrics over the steps since the last row, on the device."""


def save_checkpoint(folder: Path, state: TrainingState) -> None:
    """Write the state under `folder`, whole or not at all, and remove what was there before."""
    new = folder / f"step-{state.step:08d}"
    with atomic_folder(new) as temporary:
        save_file(_tensors_of(state), temporary / TENSORS)
        described = {
            "step": state.step,
            "config": _identity(state.config),
            "rows": state.rows,
            "scaler": state.scaler.state_dict(),
            "sha256": checksum(temporary / TENSORS),
        }
        write_text(temporary / STATE, with_checksum(described))
    for path in folder.iterdir():
        if path != new:
            shutil.rmtree(path)


def restore_checkpoint(folder: Path, state: TrainingState) -> bool:
    """Overwrite a freshly started state with the newest checkpoint, and say whether there was one.

    Raises `DamagedCheckpoint` if it is truncated or changed, `CheckpointError` if it is of another network or
    configuration.
    """
    found = sorted(folder.glob("step-*"))
    if not found:
        return False
    newest = found[-1]
    way_out = f"delete {folder} to start this training over"
    described = _read_whole(newest)
    try:
        if described["config"] != _identity(state.config):
            raise CheckpointError(f"{newest} is of another training configuration; restore that, or {way_out}")
        _restore(state, load_file(newest / TENSORS))
        state.step, state.rows = described["step"], described["rows"]
        state.scaler.load_state_dict(described["scaler"])
    except KeyError as error:
        raise CheckpointError(f"{newest} is of another version, without {error}; {way_out}") from error
    except RuntimeError as error:
        raise CheckpointError(f"{newest} is of another network ({error}); {way_out}") from error
    logger.info("continuing from step %d", state.step)
    return True


def _read_whole(newest: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; one that is not as it was written is set aside, with `DamagedCheckpoint`."""
    try:
        described = read_with_checksum(newest / STATE)
        if checksum(newest / TENSORS) == described["sha256"]:
            return described
        reason = f"{TENSORS} is truncated or changed"
    except (ArtifactError, FileNotFoundError) as error:
        reason = str(error)
    aside = newest.with_name(f"damaged-{newest.name}")
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        newest.rename(aside)
    raise DamagedCheckpoint(
        f"{newest} is damaged ({reason}); it was renamed to {aside.name}, so start again: the training begins anew"
    )


def _identity(config: TrainingConfig) -> dict[str, object]:
    """The configuration without what may differ between two attempts: where they run."""
    return {name: value for name, value in to_jsonable(config).items() if name != "device"}


def _tensors_of(state: TrainingState) -> dict[str, Tensor]:
    names = [name for name, _ in state.model.named_parameters()]
    tensors = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in state.average.average.items()}
    tensors |= {f"sums.{name}": value for name, value in state.sums.items()}
    for index, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{kind}.{names[index]}": value for kind, value in moments.items()}
    return {name: value.detach().contiguous() for name, value in tensors.items()}


def _restore(state: TrainingState, tensors: dict[str, Tensor]) -> None:
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "sums": {}, "optimizer": {}}
    for name, value in tensors.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = value
    state.model.load_state_dict(groups["model"])
    with torch.no_grad():
        for name, average in state.average.average.items():
            average.copy_(groups["average"][name])
    device = next(state.model.parameters()).device
    state.sums = {name: value.to(device) for name, value in groups["sums"].items()}
    index_of = {name: index for index, (name, _) in enumerate(state.model.named_parameters())}
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in groups["optimizer"].items():
        kind, _, parameter = name.partition(".")
        moments.setdefault(index_of[parameter], {})[kind] = value.clone()
    state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": moments})
