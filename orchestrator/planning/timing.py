"""Clocks of a calibration."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Taken:
    """Wall clock, and CPU time of all threads."""

    wall_s: float
    cpu_s: float


NOTHING = Taken(0.0, 0.0)


def timed(act: Callable[[], object]) -> Taken:
    """How long an action takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    act()
    return Taken(time.perf_counter() - wall, time.process_time() - cpu)


def per_unit(short: Taken, long: Taken, units: float) -> Taken:
    """What each of the units takes that the longer of two tries did more.

    No clock on the wall can be ahead of the processors: where noise says so, these are believed.
    """
    cpu_s = max(0.0, long.cpu_s - short.cpu_s) / units
    wall_s = max(0.0, long.wall_s - short.wall_s) / units
    return Taken(max(wall_s, cpu_s / torch.get_num_threads()), cpu_s)
