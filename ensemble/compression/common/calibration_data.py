"""What an expert's own samples make its layers see and say, on batches that are functions of a seed."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from experts.config import TrainingConfig
from experts.diffusion.few_step import FewStepSchedule
from experts.expert import Expert
from experts.networks.registry import call_network
from experts.training.latent_dataset import Batch, LatentDataset, make_batch

Rows = Float[Tensor, "row *rest"]
Chosen = Float[Tensor, "chosen *rest"]

HELD_OUT = 10**6
"""Batches from this step on measure, and calibrate nothing."""


def calibration_batches(
    dataset: LatentDataset, rows: int, seed: int, count: int, start: int = 0, course: FewStepSchedule | None = None
) -> list[Batch]:
    """So many batches of `rows` samples, a tenth of them without a condition; at the times of a course, if given."""
    training = TrainingConfig(batch_size=rows, seed=seed)
    return [at_few_step_times(make_batch(dataset, training, start + step), course, training) for step in range(count)]


def at_few_step_times(batch: Batch, course: FewStepSchedule | None, training: TrainingConfig) -> Batch:
    """The batch at the t of a course, all of them equally often; None leaves it as it is."""
    if course is None:
        return batch
    times = torch.tensor(course.times, dtype=batch.t.dtype, device=batch.t.device)
    return replace(batch, t=times[(spread_evenly(batch.t, training) * len(times)).long()])


def spread_evenly(t: Float[Tensor, " batch"], training: TrainingConfig) -> Float[Tensor, " batch"]:
    """A training's t, which is logit-normal, spread evenly between 0 and 1 instead."""
    even: Tensor = torch.special.ndtr((torch.logit(t) - training.t_mean) / training.t_std)
    return even.clamp(1e-3, 1 - 1e-3)


def run_network(model: nn.Module, expert: Expert, batch: Batch) -> Tensor:
    """What a model says in the expert's place, in the expert's own prediction."""
    noised = expert.noise_schedule.add_noise(batch.clean, batch.noise, batch.t)
    return call_network(model, noised, batch.t, batch.condition)


@contextmanager
def record_inputs(model: nn.Module, paths: Sequence[str], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Show `see` every listed layer's path, input and output whenever it is called within."""

    def hook(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], None]:
        return lambda _, args, kwargs, said: see(path, args[0] if args else next(iter(kwargs.values())), said)

    handles = [model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def subsample_rows(x: Rows, most: int) -> Chosen:
    """At most so many rows; a stride would see the same features of each, so which ones is a draw of fixed seed."""
    if len(x) <= most:
        return x
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:most].to(x.device)]


def output_error(model: nn.Module, expert: Expert, batches: Iterable[Batch]) -> float:
    """|| what the model says - what the expert says || / || what the expert says ||."""
    far, whole = 0.0, 0.0
    with torch.no_grad():
        for batch in batches:
            said, exact = run_network(model, expert, batch).double(), run_network(expert.model, expert, batch).double()
            far, whole = far + float((said - exact).square().sum()), whole + float(exact.square().sum())
    return math.sqrt(far / whole if whole else far)
