"""What all trials of a sweep share: one Ray cluster, whose CPUs and GPUs are the budget.

An embedded cluster is started once, on loopback and with a token of its own, and ends with the sweep; each trial's
controller is told its address and its token through its environment, so nothing of either is ever on a disk or in a
command line. Islands and Slurm are a budget by themselves: nothing is started for them but the home cluster.
"""

import contextlib
import os
from collections.abc import Iterator
from functools import cached_property

from orchestrator.config.compute import ComputeConfig
from orchestrator.controller import AUTH_MODE, AUTH_TOKEN, LOOPBACK_ONLY, shield
from orchestrator.sweeps.config import FULL_ERROR

IDLE_MS = ("RAY_idle_worker_killing_time_threshold_ms", "60000")
"""A worker of one trial is kept for so long while others have the CPUs: by Ray's own measure, a second, every stage
would have to import torch again."""


class SweepResources:
    """What trials may use together; nothing is started before one of them asks for it."""

    def __init__(self, compute: ComputeConfig, stack: contextlib.ExitStack) -> None:
        self._compute, self._stack = compute, stack

    @cached_property
    def cpus(self) -> int:
        """CPUs in all; as many trials run at once unless `hydra.launcher.parallel` says otherwise."""
        if self._compute.backend == "ray" and self._compute.address is not None:
            return _cpus_at(self._compute, self._compute.address)
        islands = sum(island.cpus for island in self._compute.islands.values())
        return islands or self._compute.cpus_here

    @cached_property
    def environment(self) -> dict[str, str]:
        """The environment of every trial's controller: ours, and what it needs to join the Ray cluster."""
        # A copy of before: Ray changes its own process's environment as it starts.
        ours = {name: value for name, value in os.environ.items() if name != FULL_ERROR}
        if self._compute.backend not in ("ray", "islands") or self._compute.address is not None:
            return ours
        return ours | self._stack.enter_context(_embedded(self._compute))


@contextlib.contextmanager
def shared_budget(compute: ComputeConfig) -> Iterator[SweepResources]:
    """What the trials share; it ends with the block."""
    with contextlib.ExitStack() as stack:
        yield SweepResources(compute, stack)


def _cpus_at(compute: ComputeConfig, address: str) -> int:
    """CPUs of a running Ray cluster."""
    shield(address)
    from orchestrator.backends.ray_tasks import join_cluster

    with join_cluster(compute) as cluster:
        return cluster.cpus


@contextlib.contextmanager
def _embedded(compute: ComputeConfig) -> Iterator[dict[str, str]]:
    """Start the cluster; yields what a controller's environment needs to join it."""
    shield(None)
    os.environ.setdefault(*IDLE_MS)
    added = {name: os.environ[name] for name in (LOOPBACK_ONLY, AUTH_MODE, AUTH_TOKEN) if name in os.environ}
    from orchestrator.backends.ray_tasks import SHARED_ADDRESS, join_cluster  # Ray reads all that when it is imported

    with join_cluster(compute) as cluster:
        yield {**added, SHARED_ADDRESS: cluster.address}
