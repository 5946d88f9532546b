"""The training loop of experts and router: optimizer, clipping, moving average, checkpoints."""

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ddm_core.artifacts import CACHE, Preempted, Workspace, write_text
from ddm_core.errors import DDMError
from experts.config import TrainingConfig
from experts.networks.registry import compile_for_training
from experts.training.checkpoint import MetricsRow, TrainingState, collect_tensors, restore_checkpoint, save_checkpoint
from experts.training.held_out import HELD_OUT, Measure, stopped_gaining
from experts.training.latent_dataset import Batch, LatentDataset, make_batch, step_seed
from experts.training.optimizers.ema import SNAPSHOT_WIDTHS, SNAPSHOTS, MovingAverage, write_snapshots
from experts.training.optimizers.lr_schedules import learning_rate, set_learning_rate
from experts.training.optimizers.registry import OPTIMIZERS
from experts.training.parallel.distributed import DataParallelGroup, defer_sync
from experts.training.parallel.sharding import copy_without_parameters, each_whole, shard_network, whole
from experts.training.streaming.batches import BatchesAhead
from experts.training.watch.divergence import find_divergence
from experts.training.watch.throughput import Throughput

logger = logging.getLogger(__name__)

LossValue = Tensor | dict[str, Tensor]
LossFn = Callable[[nn.Module, Batch], LossValue]
"""Maps (model, batch) to the loss, or to named scalars: `loss` is minimized, the others are only logged."""


class TrainingDiverged(DDMError):  # noqa: N818 - names the event
    """The loss is no longer a finite number."""


class DeviceError(DDMError, ValueError):
    """The configured device is not available."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """A finished training."""

    model: nn.Module
    """The moving average of the parameters; on the CPU, in evaluation mode."""
    rows: list[MetricsRow]
    """Means over `log_every` steps each: step, lr, grad_norm, loss and the other scalars of the loss; some rows have
    figures of held-out samples too."""
    early: nn.Module | None = None
    """The moving average at `early_checkpoint`; None without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What is looked at while a network trains, beside its loss."""

    measure: Measure | None = None
    """Adds figures of the averaged parameters to the metrics rows, by `held_out_every`."""
    sample_flops: float = 0.0
    """FLOPs of one sample, forward and backward; 0 is unknown."""
    stops_spikes: bool = False
    """Whether a loss far above those before it, by `spike_factor`, counts as diverged."""


NO_WATCH, NO_GROUP = Watch(), DataParallelGroup()

DETOUR = 2**40
"""Difference of the seeds of two orders of the samples of one training."""


def fit(
    model: nn.Module,
    loss: LossFn,
    dataset: LatentDataset,
    config: TrainingConfig,
    workspace: Workspace,
    on_checkpoint: Callable[[Callable[[], nn.Module]], None] | None = None,
    watch: Watch = NO_WATCH,
) -> TrainingResult:
    """Train `model` in place, from the newest checkpoint in the scratch folder if there is one.

    `on_checkpoint` is called after every checkpoint, with a function that copies the model with averaged parameters.
    A training that diverges goes back to its checkpoint once. A resumed training is bit-identical to an uninterrupted
    one. Raises `Preempted` (after saving), `TrainingDiverged`, `CheckpointError` or `DeviceError`. Every worker of a
    group calls it; it then also raises `GroupError` or `WorkerLost`.
    """
    group, checkpoints = DataParallelGroup.join(), workspace.scratch / "checkpoints"
    local_rows = group.local_rows(config.batch_size)
    device = check_device(config.device)
    with (
        group.worker_loss_as_error(),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        dataset.reading(config, workspace.scratch / CACHE / f"shards-{group.rank}"),
        BatchesAhead(config.steps, device, are_read=dataset.images is not None) as batches,
    ):
        state = init_training_state(model.to(device), config, group)
        restore_checkpoint(checkpoints, state)
        group.check_equal(state.step)
        compute_loss = group.wrap_model(model, loss, is_sharded=state.template is not None)
        log, draw = _TrainingLog(workspace, state, group, device, watch), _drawing(dataset, state, local_rows)
        while state.step < config.steps and not _ends_early(state):
            if group.any_rank(workspace.stop_requested()):
                _save(checkpoints, state, group, watch)
                raise Preempted(
                    f"stopped at step {state.step} of {config.steps}; run the same command again to continue"
                )
            with log.speed.waiting():
                batch = batches.take(state.step, draw)
            _train_step(state, compute_loss, batch.to(device), group)
            if state.step == early_step(config):
                state.early = {name: value.clone() for name, value in each_whole(state.average.average)}
            log.snapshot(state)
            has_row = state.step % config.log_every == 0 or state.step == config.steps
            is_saved = state.step % config.checkpoint_every == 0 and state.step < config.steps
            if (has_row or is_saved) and (trouble := _describe_divergence(state, watch)):
                notice = _go_back(checkpoints, state, trouble)
                group.run_on_main(partial(workspace.notify, notice))
                batches.clear()
                draw = _drawing(dataset, state, local_rows)
                log.restart(state)
                continue
            if has_row:
                log.write(_finish_row(state, watch))
            if is_saved:
                _save(checkpoints, state, group, watch)
                if on_checkpoint is not None:
                    group.run_on_main(partial(on_checkpoint, _copying_averaged(state)))
    state.optimizer.state.clear()  # the copy of the parameters takes the place of their moments
    averaged, early = _copy_averaged(state).to("cpu"), None
    if state.early:
        early = deepcopy(averaged)
        early.load_state_dict(state.early, strict=False)  # buffers are those of the model
    return TrainingResult(model=averaged, rows=state.rows, early=early)


def _drawing(dataset: LatentDataset, state: TrainingState, local_rows: slice) -> Callable[[int], Batch]:
    """Return what draws the batch of a step; after a detour in another order."""
    config = replace(state.config, seed=state.config.seed + state.detours * DETOUR) if state.detours else state.config
    return lambda step: make_batch(dataset, config, step, local_rows)


def _is_measured(state: TrainingState) -> bool:
    """Return whether the last row is the first after another `held_out_every` steps, or the last of all."""
    config, every = state.config, state.config.held_out_every
    steps = state.step % config.log_every or config.log_every
    return every is not None and (state.step == config.steps or state.step // every > (state.step - steps) // every)


def _measure(state: TrainingState, measure: Measure) -> Mapping[str, float]:
    """Measure the averaged parameters, in evaluation mode and the precision of the training."""
    config, model = state.config, state.model
    model.eval()
    with state.average.applied(), precision_of(config):
        figures = measure(model)
    model.train()
    return figures


def _ends_early(state: TrainingState) -> bool:
    """Return whether the held-out error no longer falls; not before the early checkpoint."""
    patience = state.config.stop_after_no_gain
    return (
        patience is not None
        and state.step % state.config.log_every == 0
        and state.step > early_step(state.config)
        and stopped_gaining(state.rows, patience)
    )


def early_step(config: TrainingConfig) -> int:
    """Return the step after which the early checkpoint is taken; 0 for none."""
    return 0 if config.early_checkpoint is None else max(1, round(config.early_checkpoint * config.steps))


def _copy_averaged(state: TrainingState) -> nn.Module:
    """Return a copy of the model with averaged parameters, in evaluation mode."""
    if state.template is None:
        averaged = deepcopy(state.model)
        state.average.copy_to(averaged)
        return averaged.eval()
    averaged = deepcopy(state.template)
    averaged.load_state_dict(dict(each_whole(state.average.average)), strict=False, assign=True)
    return averaged.eval()


def _copying_averaged(state: TrainingState) -> Callable[[], nn.Module]:
    """Return a function that returns `_copy_averaged`; of a sharded training already computed, by all workers."""
    if state.template is None:
        return partial(_copy_averaged, state)
    averaged = _copy_averaged(state)
    return lambda: averaged


def check_device(name: str) -> torch.device:
    """Return the device after a test allocation; raise `DeviceError` if that fails."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DeviceError(f"device {name!r} is not available ({reason}); set training.device=cpu") from error


def write_rows(path: Path, rows: list[MetricsRow]) -> None:
    """Write metrics rows as JSON Lines."""
    write_text(path, "".join(_to_json_line(row) for row in rows))


def _to_json_line(row: MetricsRow) -> str:
    """Return a row as JSON with sorted keys, because a checkpoint does not keep their order."""
    return json.dumps(row, sort_keys=True) + "\n"


def init_training_state(model: nn.Module, config: TrainingConfig, group: DataParallelGroup = NO_GROUP) -> TrainingState:
    """Return the state before the first step; the parameters of a sharded training are divided here, in place."""
    model.train()
    is_sharded = config.parallel == "fsdp" and group.size > 1
    template = copy_without_parameters(model) if is_sharded else None
    if is_sharded:
        shard_network(model, group)
    if config.compile:
        compile_for_training(model)
    widths, is_on_host = SNAPSHOT_WIDTHS if config.ema_snapshots else (), "average" in config.offload
    return TrainingState(
        config=config,
        model=model,
        template=template,
        average=MovingAverage(model, config.ema_width, is_on_host=is_on_host),
        profiles=[MovingAverage(model, width, is_on_host=is_on_host) for width in widths],
        optimizer=OPTIMIZERS[config.optimizer].build(model, config),
        scaler=torch.amp.GradScaler(config.device.partition(":")[0], enabled=config.autocast == "float16"),
    )


def _train_step(
    state: TrainingState, compute_loss: Callable[[Batch], LossValue], batch: Batch, group: DataParallelGroup
) -> None:
    """Run one optimizer step without waiting for the device: one part of the batch after the other.

    A part's loss is weighted by its share of the rows. Workers average their gradients once, with the last part.
    """
    config, parts, means = state.config, batch.divide(state.config.accumulate), dict[str, Tensor]()
    _seed(step_seed(config.seed, state.step) + group.rank, batch.t.device)
    set_learning_rate(state.optimizer, learning_rate(state.step, config))
    for parameter in state.average.source.values():  # an optimizer does it with hooks, for ten times as long
        parameter.grad = None
    for part in parts:
        share = len(part.t) / len(batch.t)
        with (
            defer_sync(compute_loss, defer=part is not parts[-1]),
            precision_of(config),
        ):
            terms = compute_loss(part)
        values = {"loss": terms} if isinstance(terms, Tensor) else terms
        if len(parts) > 1:
            values = {name: value * share for name, value in values.items()}
        torch.autograd.backward(state.scaler.scale(values["loss"]))
        _add_up(means, values)
    means = group.mean(means)
    state.scaler.unscale_(state.optimizer)
    means["grad_norm"] = whole(nn.utils.clip_grad_norm_(state.average.source.values(), config.clip_norm))
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.step += 1
    for average in (state.average, *state.profiles):
        average.update(state.step)
    _add_up(state.sums, means)


def _add_up(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        sums[name] = sums[name] + value.detach() if name in sums else value.detach()


def _seed(seed: int, device: torch.device) -> None:
    """Seed the generators of a network, for dropout; ten times faster than `torch.manual_seed`."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def precision_of(config: TrainingConfig) -> AbstractContextManager[None]:
    """Return a context of forward passes in the precision of a training."""
    if config.autocast == "none":
        return nullcontext()
    return torch.autocast(config.device.partition(":")[0], PRECISIONS[config.autocast])


PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def _finish_row(state: TrainingState, watch: Watch) -> MetricsRow:
    """Turn the sums into the next metrics row; this waits for the device."""
    row: MetricsRow = {"step": state.step, "lr": learning_rate(state.step - 1, state.config)} | _means(state)
    state.rows.append(row)
    state.sums = {}
    if watch.measure is not None and _is_measured(state):
        row.update(_measure(state, watch.measure))
    return row


def _means(state: TrainingState) -> dict[str, float]:
    """Return the means of the steps since the last row."""
    steps = state.step % state.config.log_every or state.config.log_every
    return {name: float(value) / steps for name, value in state.sums.items()}


def _describe_divergence(state: TrainingState, watch: Watch) -> str:
    """Return a sentence without its end, or an empty text if the loss since the last row is good."""
    loss, config = _means(state).get("loss", 0.0), state.config
    factor = config.spike_factor if watch.stops_spikes and state.step % config.log_every == 0 else None
    wrong = find_divergence(loss, [row["loss"] for row in state.rows], factor)
    rate = learning_rate(state.step - 1, config)
    return wrong and f"the loss is {wrong} at step {state.step} with a learning rate of {rate:.2g}"


def _go_back(checkpoints: Path, state: TrainingState, trouble: str) -> str:
    """Restore the last checkpoint, with another order of the samples from there on, and return what to say of it.

    Raises `TrainingDiverged` the second time, also if the first time is before the checkpoint, or without one.
    """
    remedy = "lower training.lr, raise training.warmup_steps, or check the data for values that are not finite"
    if state.detours == 0 and not restore_checkpoint(checkpoints, state):
        raise TrainingDiverged(f"{trouble}, before the first checkpoint; {remedy}")
    if state.detours:
        raise TrainingDiverged(f"{trouble}, although it has gone back once and trained in another order; {remedy}")
    state.detours += 1
    return f"{trouble}: it goes back to step {state.step} and trains on in another order of the samples"


def _save(folder: Path, state: TrainingState, group: DataParallelGroup, watch: Watch) -> None:
    """Save a checkpoint of finite parameters from rank 0; all workers of a group have the same."""
    if trouble := _describe_divergence(state, watch):
        raise TrainingDiverged(f"{trouble}; run the same command again, and it goes back to its last checkpoint")
    if state.template is None:
        group.run_on_main(lambda: save_checkpoint(folder, state))
        return
    tensors = each_whole(collect_tensors(state))

    def save_and_finish() -> None:
        try:
            save_checkpoint(folder, state, tensors)
        finally:
            deque(tensors, maxlen=0)  # the other workers wait for the parts of the rest, also if it fails

    if not group.is_main:
        deque(tensors, maxlen=0)
    group.run_on_main(save_and_finish)


class _TrainingLog:
    """Writes live metrics rows with their speed, and progress, neither part of an artifact; and snapshots."""

    def __init__(
        self, workspace: Workspace, state: TrainingState, group: DataParallelGroup, device: torch.device, watch: Watch
    ) -> None:
        self.workspace, self.config, self.is_silent = workspace, state.config, not group.is_main
        self.path = workspace.attempt / "metrics.jsonl"
        self.held_out: dict[str, float] = {}
        """The last measurement."""
        is_16_bit = state.config.autocast != "none"
        self.speed = Throughput(device, watch.sample_flops, group.size, is_16_bit=is_16_bit)
        self.restart(state)

    def restart(self, state: TrainingState) -> None:
        """Write the rows so far; the next one is measured from here on."""
        self.started, self.first_step, self.last_step = time.monotonic(), state.step, state.step
        if not self.is_silent:
            write_rows(self.path, state.rows)

    def snapshot(self, state: TrainingState) -> None:
        """Write the averages of the snapshots at each of `ema_snapshots` equal parts of the steps."""
        count, steps = self.config.ema_snapshots, self.config.steps
        if not self.is_silent and state.step * count // steps > (state.step - 1) * count // steps:
            write_snapshots(self.workspace.scratch / SNAPSHOTS, state.profiles, state.step)

    def write(self, row: MetricsRow) -> None:
        """Append a row and report progress."""
        if self.is_silent:
            return
        step, batch_size = int(row["step"]), self.config.batch_size
        speed = self.speed.take((step - self.last_step) * batch_size)
        self.last_step = step
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_to_json_line(row | speed))
        images = (step - self.first_step) * batch_size
        metrics = {"loss": row["loss"], "images_per_s": images / (time.monotonic() - self.started)}
        self.held_out |= {HELD_OUT: row[HELD_OUT]} if HELD_OUT in row else {}
        self.workspace.report_progress(step, self.config.steps, metrics | self.held_out, unit="steps")
