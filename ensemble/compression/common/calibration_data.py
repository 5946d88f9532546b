"""Calibration batches from an expert's own latents, and recording of layer inputs and outputs on them."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from experts.compressed.distillation.interval_embedding import jumping
from experts.config import TrainingConfig
from experts.diffusion.few_step import FewStepSchedule
from experts.expert import Expert
from experts.networks.registry import call_network
from experts.training.latent_dataset import Batch, LatentDataset, make_batch

Rows = Float[Tensor, "row *rest"]
Subset = Float[Tensor, "subset *rest"]

HELD_OUT = 10**6
"""Batches from this step on are never used for calibration, only for measurement."""


def calibration_batches(
    dataset: LatentDataset, rows: int, seed: int, count: int, start: int = 0, few_step: FewStepSchedule | None = None
) -> list[Batch]:
    """Return `count` batches of `rows` samples, a tenth of them without a condition; `few_step` sets their times."""
    training = TrainingConfig(batch_size=rows, seed=seed)
    return [at_few_step_times(make_batch(dataset, training, start + step), few_step, training) for step in range(count)]


def at_few_step_times(batch: Batch, few_step: FewStepSchedule | None, training: TrainingConfig) -> Batch:
    """Return the batch with the times of a few-step schedule, all equally often; None changes nothing."""
    if few_step is None:
        return batch
    times = torch.tensor(few_step.times, dtype=batch.t.dtype, device=batch.t.device)
    return replace(batch, t=times[(to_uniform_times(batch.t, training) * len(times)).long()])


def to_uniform_times(t: Float[Tensor, " batch"], training: TrainingConfig) -> Float[Tensor, " batch"]:
    """Transform a training's logit-normal t to a uniform distribution on [0, 1]."""
    uniform: Tensor = torch.special.ndtr(
        (torch.logit(t) - math.log(training.t_shift) - training.t_mean) / training.t_std
    )
    return uniform.clamp(1e-3, 1 - 1e-3)


def run_network(model: nn.Module, expert: Expert, batch: Batch) -> Tensor:
    """Return the output of a model that replaces the expert's network, in the expert's type of prediction."""
    noised = expert.noise_schedule.add_noise(batch.clean, batch.noise, batch.t)
    with jumping(model, None if expert.few_step is None else expert.few_step.jump_lengths(batch.t)):
        return call_network(model, noised, batch.t, batch.condition)


@contextmanager
def record_calls(
    model: nn.Module, paths: Sequence[str], record: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call `record` with path, input and output of the listed layers, for each of their calls within the context."""

    def hook(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], None]:
        return lambda _, args, kwargs, output: record(path, args[0] if args else next(iter(kwargs.values())), output)

    handles = [model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def subsample_rows(x: Rows, max_rows: int) -> Subset:
    """Return at most `max_rows` rows, chosen with a fixed seed; a stride would select the same features everywhere."""
    if len(x) <= max_rows:
        return x
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:max_rows].to(x.device)]


def output_error(model: nn.Module, expert: Expert, batches: Iterable[Batch]) -> float:
    """Return || model output - expert output || / || expert output || over all batches."""
    error, total = 0.0, 0.0
    with torch.no_grad():
        for batch in batches:
            output, exact = (
                run_network(model, expert, batch).double(),
                run_network(expert.model, expert, batch).double(),
            )
            error += float((output - exact).square().sum())
            total += float(exact.square().sum())
    return math.sqrt(error / total if total else error)
