"""Training of several networks in turns, each with an optimiser of its own; stopped and resumed bit for bit.

A turn is a generator: it yields the name of a network and its losses, that network takes a step, and what the turn
computes next already sees it. All networks are kept in one checkpoint, so none can be ahead of another.
"""

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ddm_core.artifacts import Preempted, Workspace, atomic_folder
from experts.config import TrainingConfig
from experts.training.checkpoint import (
    CheckpointError,
    DamagedCheckpoint,
    MetricsRow,
    TrainingState,
    restore_checkpoint,
    save_checkpoint,
)
from experts.training.latent_dataset import step_seed
from experts.training.trainer import PRECISIONS, TrainingDiverged, learning_rate, new_state, usable_device, write_rows

Update = tuple[str, Mapping[str, Tensor]]
"""Whose turn it is, and named scalars; `loss` is what is minimised, the others are only logged."""
UpdateStep = Callable[[Mapping[str, nn.Module], int], Iterator[Update]]
"""(networks by name, step) to the updates of that step; it may draw from torch's global generator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModels:
    """A finished training."""

    models: Mapping[str, nn.Module]
    """The moving averages of the networks; on the CPU, ready for inference."""
    rows: list[MetricsRow]
    """Means over `log_every` steps each; a metric is named after its network."""


def train_alternating(
    models: Mapping[str, nn.Module],
    turn: UpdateStep,
    config: TrainingConfig,
    workspace: Workspace,
    betas: tuple[float, float] = (0.9, 0.999),
) -> TrainedModels:
    """Train the networks in place, from the newest checkpoint in the scratch folder if there is one.

    Raises `Preempted` (after saving), `TrainingDiverged`, `CheckpointError` or `DeviceError`.
    """
    folder, device = workspace.scratch / "checkpoints", usable_device(config.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        states = {name: new_state(model.to(device), config, betas) for name, model in models.items()}
        first = next(iter(states.values()))
        _restore(folder, states)
        while first.step < config.steps:
            if workspace.stop_requested():
                _save(folder, states)
                raise Preempted(f"stopped at step {first.step} of {config.steps}; start it again to continue")
            _run_iteration(states, turn, config)
            if first.step % config.log_every == 0 or first.step == config.steps:
                _close_row(states, config, workspace)
            if first.step % config.checkpoint_every == 0 and first.step < config.steps:
                _save(folder, states)
    return TrainedModels(models={name: _averaged(state) for name, state in states.items()}, rows=first.rows)


@contextlib.contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[nn.Module]:
    """Within it, gradients run through a network to what it is given, and not to its parameters."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield model
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _run_iteration(states: Mapping[str, TrainingState], turn: UpdateStep, config: TrainingConfig) -> None:
    """Every update of one step; the metrics of all networks are added up in the first one's state."""
    first = next(iter(states.values()))
    torch.manual_seed(step_seed(config.seed, first.step))
    updates = turn({name: state.model for name, state in states.items()}, first.step)
    while True:
        with torch.autocast(config.device.partition(":")[0], PRECISIONS[config.autocast], config.autocast != "none"):
            update = next(updates, None)
        if update is None:
            break
        name, values = update
        norm = _update(states[name], values["loss"], config)
        for metric, value in (*values.items(), ("grad_norm", norm)):
            key, value = f"{name}_{metric}", value.detach()
            first.sums[key] = first.sums[key] + value if key in first.sums else value
    for state in states.values():
        state.step += 1
        state.average.update(state.step)


def _update(state: TrainingState, loss: Tensor, config: TrainingConfig) -> Tensor:
    """One step of one optimiser; the norm of the gradient before it was clipped."""
    for parameters in state.optimizer.param_groups:
        parameters["lr"] = learning_rate(state.step, config)
    state.optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(state.scaler.scale(loss))
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return norm


def _close_row(states: Mapping[str, TrainingState], config: TrainingConfig, workspace: Workspace) -> None:
    """Turn the sums into the next metrics row, and say how far the training is."""
    _check_finite(states)
    first = next(iter(states.values()))
    steps = first.step % config.log_every or config.log_every
    means = {name: float(value) / steps for name, value in first.sums.items()}
    first.rows.append({"step": first.step, "lr": learning_rate(first.step - 1, config)} | means)
    first.sums = {}
    write_rows(workspace.attempt / "metrics.jsonl", first.rows)
    workspace.report_progress(first.step, config.steps, means, unit="steps")


def _check_finite(states: Mapping[str, TrainingState]) -> None:
    first = next(iter(states.values()))
    for name, value in first.sums.items():
        if name.endswith("_loss") and not math.isfinite(value):
            raise TrainingDiverged(
                f"{name} is {float(value)} at step {first.step}; lower the stage's training.lr or raise its "
                "training.warmup_steps"
            )


def _averaged(state: TrainingState) -> nn.Module:
    averaged = deepcopy(state.model)
    state.average.copy_to(averaged)
    return averaged.to("cpu").eval().requires_grad_(True)


def _save(folder: Path, states: Mapping[str, TrainingState]) -> None:
    """Save all networks at once, and remove what was there before."""
    _check_finite(states)
    step = next(iter(states.values())).step
    new = folder / f"turn-{step:08d}"
    with atomic_folder(new) as temporary:
        for name, state in states.items():
            save_checkpoint(temporary / name, state)
    for path in folder.iterdir():
        if path != new:
            shutil.rmtree(path)


def _restore(folder: Path, states: Mapping[str, TrainingState]) -> None:
    """Overwrite fresh states with the newest checkpoint, if there is one; a damaged one is removed and reported."""
    found = sorted(folder.glob("turn-*"))
    if not found:
        return
    try:
        known = [restore_checkpoint(found[-1] / name, state) for name, state in states.items()]
    except DamagedCheckpoint:
        found[-1].rename(found[-1].with_name(f"damaged-{found[-1].name}"))
        raise
    if not all(known):
        raise CheckpointError(f"{found[-1]} lacks one of {', '.join(states)}; delete {folder} to start over")
