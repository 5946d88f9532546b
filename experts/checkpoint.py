"""Everything that is needed to continue a training bit for bit, and nothing that can be derived.

    checkpoints/step-00000500/state.safetensors   parameters, average, optimiser, sums since the last row
                              state.json          step, metrics rows, configuration, checksum; written last

A new checkpoint is whole before the one before it goes, and at most one is kept.
"""

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from artifacts import ArtifactError, checksum, plain, read_json, replaced_folder, write_json
from experts.config import TrainingConfig
from experts.ema import MovingAverage

logger = logging.getLogger(__name__)

MetricsRow = dict[str, int | float]


class CheckpointError(Exception):
    """A checkpoint cannot be continued from."""


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
    with replaced_folder(new) as temporary:
        save_file(_tensors_of(state), temporary / "state.safetensors")
        described = {
            "step": state.step,
            "config": _identity(state.config),
            "rows": state.rows,
            "scaler": state.scaler.state_dict(),
            "sha256": checksum(temporary / "state.safetensors"),
        }
        write_json(temporary / "state.json", described)
    for path in folder.iterdir():
        if path != new:
            shutil.rmtree(path)


def restore_checkpoint(folder: Path, state: TrainingState) -> bool:
    """Overwrite a freshly started state with the newest checkpoint, and say whether there was one.

    Raises `CheckpointError` if it is truncated, changed, or of another network or configuration.
    """
    found = sorted(folder.glob("step-*"))
    if not found:
        return False
    newest = found[-1]
    way_out = f"delete {folder} to start this training over"
    try:
        described = read_json(newest / "state.json")
        if described["config"] != _identity(state.config):
            raise CheckpointError(f"{newest} is of another training configuration; restore that, or {way_out}")
        if checksum(newest / "state.safetensors") != described["sha256"]:
            raise CheckpointError(f"{newest / 'state.safetensors'} is truncated or changed; {way_out}")
        _restore(state, load_file(newest / "state.safetensors"))
        state.step, state.rows = described["step"], described["rows"]
        state.scaler.load_state_dict(described["scaler"])
    except (ArtifactError, SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{newest} cannot be read ({error}); {way_out}") from error
    except RuntimeError as error:
        raise CheckpointError(f"{newest} is of another network ({error}); {way_out}") from error
    logger.info("continuing from step %d", state.step)
    return True


def _identity(config: TrainingConfig) -> dict[str, object]:
    """The configuration without what may differ between two attempts: where they run."""
    return {name: value for name, value in plain(config).items() if name != "device"}


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
