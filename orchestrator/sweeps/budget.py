"""What all trials of a sweep share: one Ray cluster, whose CPUs and GPUs are the budget.

An embedded cluster is started once, on loopback and with a token of its own, and ends with the sweep; each trial's
controller is told its address and its token through its environment, so nothing of either is ever on a disk or in a
command line. Islands and Slurm are a budget by themselves: nothing is started for them but the home cluster.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from orchestrator.compose import FULL_ERROR
from orchestrator.compute_config import ComputeConfig
from orchestrator.controller import LOOPBACK_ONLY

IDLE_MS = ("RAY_idle_worker_killing_time_threshold_ms", "60000")
"""A worker of one trial is kept for so long while others have the CPUs: by Ray's own measure, a second, every stage
would have to import torch again."""

AUTH_MODE, AUTH_TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What trials may use together."""

    cpus: int
    """CPUs in all; as many trials run at once unless `hydra.launcher.parallel` says otherwise."""
    environment: dict[str, str]
    """The environment of every trial's controller."""


@contextlib.contextmanager
def shared_budget(compute: ComputeConfig) -> Iterator[Budget]:
    """Start what the trials share, for as long as the block lasts."""
    # A copy of before: Ray changes its own process's environment as it starts.
    environment = {name: value for name, value in os.environ.items() if name != FULL_ERROR}
    if compute.backend not in ("ray", "islands"):
        yield Budget(cpus=cpus_here(), environment=environment)
    elif compute.address is not None:
        yield Budget(cpus=_cpus_at(compute), environment=environment)
    else:
        with _embedded(compute) as (cpus, added):
            islands = sum(island.cpus for island in compute.islands.values())
            yield Budget(cpus=islands or cpus, environment=environment | added)


def cpus_here() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def _cpus_at(compute: ComputeConfig) -> int:
    if (compute.address or "").startswith("127."):
        os.environ.setdefault(LOOPBACK_ONLY, "0")
    from orchestrator.ray_backend import joined_cluster

    with joined_cluster(compute) as cluster:
        return cluster.cpus


@contextlib.contextmanager
def _embedded(compute: ComputeConfig) -> Iterator[tuple[int, dict[str, str]]]:
    """Start the cluster; yields its CPUs, and what a controller's environment needs to join it."""
    os.environ.setdefault(LOOPBACK_ONLY, "0")
    os.environ.setdefault(*IDLE_MS)
    if AUTH_MODE not in os.environ:
        os.environ.update({AUTH_MODE: "token", AUTH_TOKEN: secrets.token_hex(32)})
    added = {name: os.environ[name] for name in (LOOPBACK_ONLY, AUTH_MODE, AUTH_TOKEN) if name in os.environ}
    from orchestrator.ray_backend import SHARED_ADDRESS, joined_cluster  # Ray reads all that when it is imported

    with joined_cluster(compute) as cluster:
        yield cluster.cpus, {**added, SHARED_ADDRESS: cluster.address}
