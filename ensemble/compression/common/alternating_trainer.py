"""Alternating training of several networks, each with its own optimizer; a resumed training is bit-identical.

The updates of a step are a generator: it yields the name of a network and its losses, the trainer updates that network,
and the generator continues with the updated network. All networks are stored in one checkpoint, so they always match.
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
from experts.training.optimizers.lr_schedules import learning_rate, set_learning_rate
from experts.training.trainer import (
    TrainingDiverged,
    check_device,
    init_training_state,
    precision_of,
    write_rows,
)

Update = tuple[str, Mapping[str, Tensor]]
"""(network to update, scalars by name); `loss` is minimized, the others are only logged."""
UpdateStep = Callable[[Mapping[str, nn.Module], int], Iterator[Update]]
"""(networks by name, step) to the updates of that step; it may use torch's global random generator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModels:
    """Result of a training."""

    models: Mapping[str, nn.Module]
    """Moving averages of the networks, on the CPU."""
    rows: list[MetricsRow]
    """Metrics, each a mean over `log_every` steps; names start with the name of the network."""


def train_alternating(
    models: Mapping[str, nn.Module],
    update_step: UpdateStep,
    config: TrainingConfig,
    workspace: Workspace,
) -> TrainedModels:
    """Train the networks in place; continue from the newest checkpoint in the scratch folder if there is one.

    Raises `Preempted` (after saving), `TrainingDiverged`, `CheckpointError` or `DeviceError`.
    """
    folder, device = workspace.scratch / "checkpoints", check_device(config.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        states = {name: init_training_state(model.to(device), config) for name, model in models.items()}
        first = next(iter(states.values()))
        _restore(folder, states)
        while first.step < config.steps:
            if workspace.stop_requested():
                _save(folder, states)
                raise Preempted(f"stopped at step {first.step} of {config.steps}; start it again to continue")
            _run_step(states, update_step, config)
            if first.step % config.log_every == 0 or first.step == config.steps:
                _log_row(states, config, workspace)
            if first.step % config.checkpoint_every == 0 and first.step < config.steps:
                _save(folder, states)
    return TrainedModels(models={name: _copy_average(state) for name, state in states.items()}, rows=first.rows)


@contextlib.contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[nn.Module]:
    """Freeze the parameters of a network within the context; gradients still flow through it to its inputs."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield model
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _run_step(states: Mapping[str, TrainingState], update_step: UpdateStep, config: TrainingConfig) -> None:
    """Run all updates of one step, and add the metrics of all networks to the state of the first."""
    first = next(iter(states.values()))
    torch.manual_seed(step_seed(config.seed, first.step))
    updates = update_step({name: state.model for name, state in states.items()}, first.step)
    while True:
        with precision_of(config):
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
    """Update one network; return the norm of its gradient before clipping."""
    set_learning_rate(state.optimizer, learning_rate(state.step, config))
    state.optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(state.scaler.scale(loss))
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return norm


def _log_row(states: Mapping[str, TrainingState], config: TrainingConfig, workspace: Workspace) -> None:
    """Write the next metrics row from the accumulated sums, and report progress."""
    _check_finite(states)
    first = next(iter(states.values()))
    steps = first.step % config.log_every or config.log_every
    means = {name: float(value) / steps for name, value in first.sums.items()}
    first.rows.append({"step": first.step, "lr": learning_rate(first.step - 1, config)} | means)
    first.sums = {}
    write_rows(workspace.attempt / "metrics.jsonl", first.rows)
    workspace.report_progress(first.step, config.steps, means, unit="steps")


def _check_finite(states: Mapping[str, TrainingState]) -> None:
    """Raise `TrainingDiverged` if a loss is not finite."""
    first = next(iter(states.values()))
    for name, value in first.sums.items():
        if name.endswith("_loss") and not math.isfinite(value):
            raise TrainingDiverged(
                f"{name} is {float(value)} at step {first.step}; lower the stage's training.lr or raise its "
                "training.warmup_steps"
            )


def _copy_average(state: TrainingState) -> nn.Module:
    """Return the moving average of a network on the CPU, in evaluation mode."""
    averaged = deepcopy(state.model)
    state.average.copy_to(averaged)
    return averaged.to("cpu").eval().requires_grad_(True)


def _save(folder: Path, states: Mapping[str, TrainingState]) -> None:
    """Save all networks as one checkpoint, and remove older ones."""
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
    """Load the newest checkpoint into fresh states, if there is one; rename a damaged one and raise its error."""
    checkpoints = sorted(folder.glob("turn-*"))
    if not checkpoints:
        return
    newest = checkpoints[-1]
    try:
        is_restored = [restore_checkpoint(newest / name, state) for name, state in states.items()]
    except DamagedCheckpoint:
        newest.rename(newest.with_name(f"damaged-{newest.name}"))
        raise
    if not all(is_restored):
        raise CheckpointError(f"{newest} lacks one of {', '.join(states)}; delete {folder} to start over")
