"""The resources that all trials of a sweep share: one Ray cluster with its CPUs and GPUs.

An embedded cluster is started once, on loopback and with its own token, and ends with the sweep. Each trial's
controller receives address and token through its environment, so neither is ever on a disk or on a command line.
Islands and Slurm limit their own resources: for them only the controller's cluster is started.
"""

import contextlib
import os
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

from orchestrator.config.compute import ComputeConfig
from orchestrator.controller import AUTH_MODE, AUTH_TOKEN, LOOPBACK_ONLY, configure_ray_security
from orchestrator.sweeps.config import FULL_ERROR

if TYPE_CHECKING:
    from orchestrator.backends.ray_cluster import RayCluster

IDLE_MS = ("RAY_idle_worker_killing_time_threshold_ms", "60000")
"""How long Ray keeps idle workers of a trial while others use the CPUs. With Ray's default of one second, every stage
would import torch again."""


class SweepResources:
    """Resources shared by all trials; the Ray cluster starts when the first trial needs it."""

    def __init__(self, compute: ComputeConfig, stack: contextlib.ExitStack) -> None:
        self._compute, self._stack = compute, stack

    @cached_property
    def cpus(self) -> int:
        """Return the total number of CPUs, which is the default number of parallel trials."""
        if self._compute.backend == "ray" and self._compute.address is not None:
            return _count_cluster_cpus(self._compute, self._compute.address)
        islands = sum(island.cpus for island in self._compute.islands.values())
        return islands or self._compute.cpus_here

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of a trial's controller: ours, plus access to the Ray cluster, which must be alive."""
        inherited = self._inherited
        if self._compute.backend not in ("ray", "islands") or self._compute.address is not None:
            return inherited
        if dead := self._cluster.find_dead():
            self._cluster.restart(dead)
        from orchestrator.backends.ray_cluster import SHARED_CLUSTER_ADDRESS

        switches = {name: os.environ[name] for name in (LOOPBACK_ONLY, AUTH_MODE, AUTH_TOKEN) if name in os.environ}
        return inherited | switches | {SHARED_CLUSTER_ADDRESS: self._cluster.address}

    @cached_property
    def _inherited(self) -> dict[str, str]:
        """Return our environment from before Ray starts, which changes it."""
        return {name: value for name, value in os.environ.items() if name != FULL_ERROR}

    @cached_property
    def _cluster(self) -> "RayCluster":
        configure_ray_security(None)
        os.environ.setdefault(*IDLE_MS)
        from orchestrator.backends.ray_cluster import RayCluster  # Ray reads these variables when it is imported

        cluster = RayCluster(self._compute)
        self._stack.callback(cluster.close)
        return cluster


@contextlib.contextmanager
def open_shared_resources(compute: ComputeConfig) -> Iterator[SweepResources]:
    """Open the shared resources; they are released when the block ends."""
    with contextlib.ExitStack() as stack:
        yield SweepResources(compute, stack)


def _count_cluster_cpus(compute: ComputeConfig, address: str) -> int:
    """Count the CPUs of a running Ray cluster."""
    configure_ray_security(address)
    from orchestrator.backends.ray_cluster import RayCluster

    with contextlib.closing(RayCluster(compute)) as cluster:
        return max(1, int(cluster.resources.get("CPU", 0)))
