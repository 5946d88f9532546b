"""The networks that the trainer's benchmark trains and samples, and CPU times of two sides in turns."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from benchmarks.record import Claim, Listing, median_and_range
from experts.config import DiTConfig, NetworkConfig, ResidualMLPConfig, UNetConfig
from experts.diffusion.noise_schedule import RECTIFIED_FLOW
from experts.networks.registry import build_network
from experts.training.latent_dataset import LatentDataset
from experts.training.loss import expert_loss

CLASSES = 10
LOSS = partial(expert_loss, prediction="velocity", noise_schedule=RECTIFIED_FLOW)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A network and its training."""

    call: str
    """Its name in `bare_loop.CALLS`."""
    network: NetworkConfig
    shape: tuple[int, int, int]
    batch_size: int
    steps: int


CASES = {
    "MLP, small": Case(
        call="mlp", network=ResidualMLPConfig(width=128, depth=2), shape=(2, 4, 4), batch_size=60, steps=1000
    ),
    "MLP, default": Case(call="mlp", network=ResidualMLPConfig(), shape=(6, 4, 4), batch_size=60, steps=400),
    "U-Net": Case(call="unet", network=UNetConfig(), shape=(4, 16, 16), batch_size=16, steps=30),
    "DiT": Case(call="dit", network=DiTConfig(), shape=(4, 16, 16), batch_size=16, steps=50),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured."""

    turns: int
    """Pairs of each comparison."""
    is_tiny: bool
    """Whether all is as small as can be, to see that it runs."""

    def cases(self) -> dict[str, Case]:
        """Return the networks by name."""
        return {name: replace(case, steps=4) for name, case in CASES.items()} if self.is_tiny else CASES


Measured = tuple[list[Claim], list[Listing]]
"""The claims and the tables of one part of the benchmark."""


def make_dataset(case: Case, count: int = 2048) -> LatentDataset:
    """Return random latents with classes."""
    generator = torch.Generator().manual_seed(0)
    return LatentDataset(
        clean=torch.randn(count, *case.shape, generator=generator),
        class_id=torch.arange(count) % CLASSES,
        cluster_id=torch.zeros(count, dtype=torch.int64),
    )


def make_network(case: Case) -> nn.Module:
    """Return the network of a case, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_network(case.network, case.shape, CLASSES)


def ratios(ours: Callable[[], object], theirs: Callable[[], object], turns: int) -> list[float]:
    """Return the ratios of the CPU times of two functions that run in turns; the first turn warms up."""
    measured = []
    for turn in range(turns + 1):
        order = (ours, theirs) if turn % 2 else (theirs, ours)
        seconds = {function: cpu_seconds(function) for function in order}
        measured.append(seconds[ours] / seconds[theirs])
    return measured[1:]


def cpu_seconds(function: Callable[[], object]) -> float:
    """Return the CPU time of one call, summed over all threads of this process."""
    started = time.process_time()
    function()
    return time.process_time() - started


def ratio_claim(name: str, limit: float, measured: Sequence[float]) -> Claim:
    """Return the claim that the median of measured ratios is at most the limit."""
    value, spread = median_and_range(measured)
    return Claim(name=name, bar=f"≤ {limit:g}", value=value, spread=spread, holds=float(value) <= limit)
