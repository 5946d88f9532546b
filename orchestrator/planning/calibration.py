"""The measurements for a plan: the work of every stage, and the speed of each place. Imports no torch."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from ddm_core.artifacts import fingerprint, to_jsonable
from ddm_core.json_values import read_record
from orchestrator.config.compute import ComputeConfig
from orchestrator.config.schema import RunConfig
from orchestrator.errors import OrchestratorError
from orchestrator.pipeline.stage import Stage
from orchestrator.run.run_folder import RunFolder

TIMEOUT_S = 900.0
"""Time after which a calibration is considered stuck."""

BUSY_SHARE = 0.85
"""A machine is reported as busy if a measurement gets less than this share of its CPUs."""

RESULT_PREFIX = "CALIBRATION "
"""Prefix of the output line with the measured `Place`; its `start_s` is the duration of the measurement."""


class CalibrationFailed(OrchestratorError):
    """The measuring process ended without a result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpeed:
    """Time of one unit of work: an image through a training step, a row through a network, an image read."""

    unit_s: float
    """Wall clock."""
    cpu_s: float = 0.0
    """CPU time of all threads; far less than unit_s times their number means that the machine is busy."""
    once_s: float = 0.0
    """Additional time of the first unit."""
    unit_flops: float = 0.0
    """Floating point operations of a unit; 0 means not counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A number of units of one kind of work."""

    speed: str
    """A key of `Place.speeds`."""
    count: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The work of a stage, independent of where it runs."""

    flops: float | None
    """None if it depends on an unknown number of images."""
    parts: tuple[Part, ...] | None
    is_upper_bound: bool = False
    """Whether the work depends on the data and this is its maximum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The speed of the controller's machine or of an island."""

    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    start_s: float = 0.0
    """From submission to the first line of a stage, in a new process."""
    checkpoint_s: float = 0.0
    """Time to save one checkpoint of an expert."""
    speeds: dict[str, StageSpeed] = field(default_factory=dict)
    cpu_share: float = 1.0
    """Share of its CPUs that the measurement got; below 1 the machine was busy."""
    problem: str = ""
    """Why there are no speeds, if there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """All inputs of a plan that need torch or an island."""

    fingerprint: str
    created: str
    """Date and time, ISO 8601."""
    work: dict[str, Work]
    """By the stage's name."""
    bytes: dict[str, int]
    """Sizes of artifacts, or of parts of them, by `<stage>` or `<stage>/<part>`."""
    places: dict[str, Place]
    """By the island's name; `controller` is the controller's machine."""
    parameters: int
    """Number of parameters of one expert."""


def calibration_fingerprint(graph: Sequence[Stage], compute: ComputeConfig) -> str:
    """Return the hash of every stage and its resources; the location of islands does not matter."""
    return fingerprint("calibration", compute.stages, {stage.name: stage.fingerprint for stage in graph})


def find_calibration(run: RunFolder, graph: Sequence[Stage], compute: ComputeConfig) -> tuple[Calibration | None, str]:
    """Return the run's calibration and a description of it, or None and how to get one."""
    if not run.calibration.is_file():
        return None, "Times, prices and other FLOPs need a calibration: add --calibrate (under a minute)."
    calibration = read_record(Calibration, run.calibration)
    if calibration.fingerprint != calibration_fingerprint(graph, compute):
        return None, f"{run.calibration} is of another configuration: repeat the command with --calibrate."
    machines = "; ".join(f"{name}: {_describe(place)}" for name, place in calibration.places.items())
    return calibration, f"Calibrated {calibration.created} ({machines})."


def _describe(place: Place) -> str:
    """Describe the machine, and anything that makes its figures pessimistic."""
    busy = f", busy: the measurement got {place.cpu_share:.0%} of its CPUs, so a run may be faster"
    words = f"{place.machine}{busy if place.cpu_share < BUSY_SHARE else ''}"
    return f"{words}, not measured: {place.problem}" if place.problem else words


def calibrate(config: RunConfig) -> None:
    """Measure in a separate process, since this one must not import torch; raises `CalibrationFailed`."""
    command = [sys.executable, "-P", "-m", "orchestrator.planning.calibrate"]
    try:
        process = subprocess.run(
            command,
            input=json.dumps(to_jsonable(config)),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CalibrationFailed(f"the calibration took more than {TIMEOUT_S:g} s and was ended") from None
    if process.returncode:
        last_line = (process.stderr.strip() or "it printed nothing").splitlines()[-1]
        raise CalibrationFailed(f"the calibration failed: {last_line}")
