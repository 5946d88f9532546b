"""`fit` against a plain loop that shares nothing with it, and what waits for the device in its steps."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.arms import bare_loop
from benchmarks.arms.trainer.cases import LOSS, Case, Effort, Measured, make_dataset, make_network, ratio_claim, ratios
from benchmarks.record import Claim
from ddm_core.artifacts import Workspace
from experts.config import TrainingConfig
from experts.training.trainer import fit

PLAIN = TrainingConfig(checkpoint_every=10**6, held_out_every=None)
"""Without checkpoints and held-out losses, which the plain loop has not."""


def measure_steps(effort: Effort) -> Measured:
    """Compare the CPU time of whole trainings of every network."""
    name = "steps: CPU time of `fit` over that of an independent plain loop"
    claims = [
        ratio_claim(f"{name}: {case_name}", 1.02, compare_training(case, effort.turns))
        for case_name, case in effort.cases().items()
    ]
    return claims, []


def compare_training(case: Case, turns: int) -> list[float]:
    """Return the CPU time of `fit` over that of the plain loop, one ratio for each turn."""
    dataset, warmup = make_dataset(case), 2

    def run_bare() -> None:
        bare_loop.train(
            make_network(case),
            bare_loop.CALLS[case.call],
            dataset.clean,
            dataset.class_id,
            steps=case.steps,
            batch_size=case.batch_size,
            warmup=warmup,
        )

    config = replace(PLAIN, steps=case.steps, batch_size=case.batch_size, warmup_steps=warmup)
    return ratios(lambda: run_fit(case, config), run_bare, turns)


def run_fit(case: Case, config: TrainingConfig) -> None:
    """Train the network of a case."""
    with tempfile.TemporaryDirectory() as folder:
        fit(make_network(case), LOSS, make_dataset(case), config, Workspace.at(Path(folder)))


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
        run_fit(case, replace(PLAIN, steps=steps, log_every=100, batch_size=4))
    return counted.count
