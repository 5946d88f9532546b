"""Training checkpoints: the state that resumes a training bit for bit, without anything that can be derived.

    checkpoints/step-00000500/state.safetensors   parameters, average, optimizer, sums since the last row
                              state.json          step, metrics rows, configuration, checksums; written last

A new checkpoint is complete before the previous one is deleted, and at most one is stored. A damaged checkpoint is
renamed and reported; training then restarts from step 0 and is bit-identical.
"""

import contextlib
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ddm_core.artifacts import ArtifactError, atomic_folder, read_with_checksum, to_jsonable, write_record
from ddm_core.errors import DDMError
from ddm_core.files.checksums import checksum
from experts.config import TrainingConfig
from experts.training.optimizers.adamw_8bit import join_moment, split_moment
from experts.training.optimizers.ema import MovingAverage
from experts.training.parallel.sharding import divide_like, each_whole
from experts.training.parallel.tensor_file import write_tensors

logger = logging.getLogger(__name__)

MetricsRow = dict[str, int | float]

STATE, TENSORS = "state.json", "state.safetensors"


class CheckpointError(DDMError):
    """Training cannot resume from a checkpoint."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint was damaged and has been renamed; the next start trains from step 0."""


@dataclass(slots=True, kw_only=True)
class TrainingState:
    """The state of a training between two steps."""

    config: TrainingConfig
    model: nn.Module
    average: MovingAverage
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    """Finished steps."""
    rows: list[MetricsRow] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Sums of the metrics over the steps since the last row, on the device."""
    profiles: list[MovingAverage] = field(default_factory=list)
    """The averages of the snapshots, by `SNAPSHOT_WIDTHS`; none without snapshots."""
    detours: int = 0
    """How often it went back to a checkpoint because it diverged; each has an order of the samples of its own."""
    early: dict[str, Tensor] = field(default_factory=dict)
    """The average at `config.early_checkpoint`, on the CPU; empty before."""
    template: nn.Module | None = None
    """The network without parameters, where the workers of a group keep parts of them; else None."""


MAY_DIFFER = ("device", "parallel", "cache_gb", "readers")


def save_checkpoint(folder: Path, state: TrainingState, tensors: Iterable[tuple[str, Tensor]] | None = None) -> None:
    """Write the state below `folder` atomically, and delete older checkpoints.

    `tensors` are those of `collect_tensors`, put together one after the other; None does that here.
    """
    new, like = folder / f"step-{state.step:08d}", collect_tensors(state)
    with atomic_folder(new) as temporary:
        write_tensors(temporary / TENSORS, like, each_whole(like) if tensors is None else tensors)
        content = {
            "step": state.step,
            "config": _identity(state.config),
            "rows": state.rows,
            "detours": state.detours,
            "scaler": state.scaler.state_dict(),
            "sha256": checksum(temporary / TENSORS),
        }
        write_record(temporary / STATE, content)
    for path in folder.iterdir():
        if path != new:
            shutil.rmtree(path)


def restore_checkpoint(folder: Path, state: TrainingState) -> bool:
    """Overwrite an initial state with the newest checkpoint, and return whether there was one.

    Raises `DamagedCheckpoint` if it is truncated or changed, `CheckpointError` if it is of another network or
    configuration.
    """
    checkpoints = sorted(folder.glob("step-*"))
    if not checkpoints:
        return False
    newest = checkpoints[-1]
    remedy = f"delete {folder} to restart this training"
    content = _read_checkpoint(newest)
    try:
        if _identity(TrainingConfig()) | content["config"] != _identity(state.config):  # fields added since: default
            raise CheckpointError(f"{newest} has another training configuration; restore that one, or {remedy}")
        _restore(state, newest / TENSORS)
        state.step, state.rows, state.detours = content["step"], content["rows"], content.get("detours", 0)
        state.scaler.load_state_dict(content["scaler"])
    except KeyError as error:
        raise CheckpointError(f"{newest} has another version, without {error}; {remedy}") from error
    except RuntimeError as error:
        raise CheckpointError(f"{newest} has another network ({error}); {remedy}") from error
    logger.info("continuing from step %d", state.step)
    return True


def _read_checkpoint(newest: Path) -> dict[str, Any]:
    """Return the content of `state.json`; rename a damaged checkpoint and raise `DamagedCheckpoint`."""
    try:
        content = read_with_checksum(newest / STATE)
        if checksum(newest / TENSORS) == content["sha256"]:
            return content
        reason = f"{TENSORS} is truncated or changed"
    except (ArtifactError, FileNotFoundError) as error:
        reason = str(error)
    renamed = newest.with_name(f"damaged-{newest.name}")
    shutil.rmtree(renamed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        newest.rename(renamed)
    raise DamagedCheckpoint(
        f"{newest} is damaged ({reason}) and was renamed to {renamed.name}; "
        "run the same command again to restart from step 0"
    )


def _identity(config: TrainingConfig) -> dict[str, object]:
    """Return the configuration without where and by how many it runs, which may differ between two attempts."""
    return {name: value for name, value in to_jsonable(config).items() if name not in MAY_DIFFER}


def collect_tensors(state: TrainingState) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint by name; of a sharded training, divided ones."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in state.model.named_parameters()}
    tensors = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in state.average.average.items()}
    for number, profile in enumerate(state.profiles):
        tensors |= {f"profile{number}.{name}": value for name, value in profile.average.items()}
    tensors |= {f"sums.{name}": value for name, value in state.sums.items()}
    tensors |= {f"early.{name}": value for name, value in state.early.items()}
    for parameter, moments in state.optimizer.state.items():
        for kind, moment in moments.items():
            parts = split_moment(moment).items()
            tensors |= {f"optimizer.{kind}{part}.{names[parameter]}": value for part, value in parts}
    return tensors


def _restore(state: TrainingState, path: Path) -> None:
    """Copy a file of whole tensors into the state, one after the other; each worker keeps its parts."""
    parameters = dict(state.model.named_parameters())
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "sums": {}, "early": {}, "optimizer": {}}
    groups |= {f"profile{number}": {} for number in range(len(state.profiles))}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no dictionary
            group, _, rest = name.partition(".")
            like = parameters.get(rest.partition(".")[2] if group == "optimizer" else rest)
            groups[group][rest] = divide_like(file.get_tensor(name), like)
    state.model.load_state_dict(groups["model"])
    averages = {"average": state.average} | {f"profile{number}": each for number, each in enumerate(state.profiles)}
    with torch.no_grad():
        for group, kept in averages.items():
            for name, average in kept.average.items():
                average.copy_(groups[group][name])
    device = next(state.model.parameters()).device
    state.sums = {name: value.to(device) for name, value in groups["sums"].items()}
    state.early = groups["early"]
    moments: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, value in groups["optimizer"].items():
        kind, _, parameter = name.partition(".")
        kind, separator, part = kind.partition(":")
        moments.setdefault((parameter, kind), {})[separator + part] = value.to(device, copy=True)
    for (parameter, kind), parts in moments.items():
        state.optimizer.state[parameters[parameter]][kind] = join_moment(parts)
