"""`fit` against two loops that share nothing with it, and what waits for the device in its steps."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.arms import bare_loop, script_loop
from benchmarks.arms.trainer.cases import (
    CLASSES,
    LOSS,
    Case,
    Effort,
    Measured,
    make_dataset,
    make_network,
    ratio_claim,
    take_turns,
)
from benchmarks.record import Claim, Listing
from ddm_core.artifacts import Workspace
from experts.config import TrainingConfig
from experts.training.latent_dataset import LatentDataset
from experts.training.trainer import fit

PLAIN = TrainingConfig(checkpoint_every=10**6, held_out_every=None)
"""Without checkpoints and held-out losses, which the plain loop has not."""


NAME = "steps: CPU time of `fit` over that of"
BARS = {"an independent plain loop": 1.02, "diffusers' script loop": 1.0}
"""The loops that `fit` is compared with, and the bar of each."""


def measure_steps(effort: Effort) -> Measured:
    """Compare the CPU time of whole trainings of every network."""
    seconds = {name: time_trainings(case, effort.turns) for name, case in effort.cases().items()}
    claims = [
        ratio_claim(f"{NAME} {other}: {name}", bar, [a / b for a, b in zip(sides["`fit`"], sides[other], strict=True)])
        for other, bar in BARS.items()
        for name, sides in seconds.items()
    ]
    rows = [
        (name, *(f"{1e3 * median(values) / effort.cases()[name].steps:.2f}" for values in sides.values()))
        for name, sides in seconds.items()
    ]
    listing = Listing(title="steps: CPU ms a step", columns=("network", "`fit`", *BARS), rows=rows)
    return claims, [listing]


def time_trainings(case: Case, turns: int) -> dict[str, list[float]]:
    """Return the CPU seconds of `fit`, the plain loop and the script's loop, one for each turn.

    All train equal networks on the same latents, in batches of one size.
    """
    dataset, call, warmup = make_dataset(case), case.bare_call(), 2
    data = (call, dataset.clean, torch.arange(len(dataset)) % CLASSES)

    def run(train: Callable[..., object]) -> None:
        train(make_network(case), *data, steps=case.steps, batch_size=case.batch_size, warmup=warmup)

    config = replace(PLAIN, steps=case.steps, batch_size=case.batch_size, warmup_steps=warmup)
    sides: dict[str, Callable[[], object]] = {
        "`fit`": lambda: run_fit(case, config, dataset),
        "an independent plain loop": lambda: run(bare_loop.train),
        "diffusers' script loop": lambda: run(script_loop.train),
    }
    return take_turns(sides, turns)


def run_fit(case: Case, config: TrainingConfig, dataset: LatentDataset) -> None:
    """Train the network of a case."""
    with tempfile.TemporaryDirectory() as folder:
        fit(make_network(case), LOSS, dataset, config, Workspace.at(Path(folder)))


class CountWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that wait for the device: those that make a Python number of a tensor."""

    def __init__(self) -> None:
        """Begin at none."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the operator, and count it if it waits."""
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def measure_waits(effort: Effort) -> Measured:
    """Count the waits of a step between two log lines: those of nine steps less those of two."""
    waits = {name: count_waits(case, 9) - count_waits(case, 2) for name, case in effort.cases().items()}
    claim = Claim(
        name="waits: operators of seven steps between two log lines that wait for the device",
        bar="0",
        value=str(max(waits.values())),
        spread=f"n = {len(waits)} networks",
        holds=not any(waits.values()),
    )
    return [claim], []


def count_waits(case: Case, steps: int) -> int:
    """Return the operators that wait for the device in a training with one log line."""
    counted = CountWaits()
    with counted:
        run_fit(case, replace(PLAIN, steps=steps, log_every=100, batch_size=4), make_dataset(case))
    return counted.count
