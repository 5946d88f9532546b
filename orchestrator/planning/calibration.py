"""What was measured for a plan: the work of every stage, and how quick each place is at it. Imports no torch."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import TypeAdapter

from ddm_core.artifacts import fingerprint, read_json, to_jsonable
from orchestrator.config.compute import ComputeConfig
from orchestrator.config.schema import RunConfig
from orchestrator.errors import OrchestratorError
from orchestrator.pipeline.stage import Stage
from orchestrator.run.run_folder import RunFolder

LONGEST_S = 900.0
"""A calibration that takes longer is stuck."""

BUSY = 0.85
"""A machine that gives a measurement less than this share of its CPUs is called busy."""

SAID = "CALIBRATION "
"""What the line begins with that holds the measurement: a `Place`, whose `start_s` is how long measuring took."""


class CalibrationFailed(OrchestratorError):
    """The measuring process ended without a result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpeed:
    """How long one unit of work takes: an image through a training step, a row through a network, an image read."""

    unit_s: float
    """Wall clock."""
    cpu_s: float = 0.0
    """CPU time of all threads; much less than they could have had is the sign of a busy machine."""
    once_s: float = 0.0
    """What the first unit costs more than the others."""
    unit_flops: float = 0.0
    """Floating point operations in it; 0 is not counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """So many units of one kind of work."""

    speed: str
    """A key of `Place.speeds`."""
    count: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a stage has to do, wherever it runs."""

    flops: float | None
    """None: it depends on a number of images that nobody knows yet."""
    parts: tuple[Part, ...] | None
    is_upper_bound: bool = False
    """Whether the data will decide, and it is at most this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """How quick home or an island is."""

    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    start_s: float = 0.0
    """From submission to the first line of a stage, in a new process."""
    checkpoint_s: float = 0.0
    """To save one checkpoint of an expert."""
    speeds: dict[str, StageSpeed] = field(default_factory=dict)
    cpu_share: float = 1.0
    """How much of its CPUs the machine gave to the measurement; less than all means that it was busy."""
    problem: str = ""
    """Why there are no speeds, if there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Everything that a plan needs and that only torch, or an island, can tell."""

    fingerprint: str
    created: str
    """Date and time, ISO 8601."""
    work: dict[str, Work]
    """By the stage's name."""
    bytes: dict[str, int]
    """Sizes of artifacts, or of parts of them, by `<stage>` or `<stage>/<part>`."""
    places: dict[str, Place]
    """By the island's name; `home` is where the controller is."""
    parameters: int
    """Of one expert."""


def identity(graph: Sequence[Stage], compute: ComputeConfig) -> str:
    """What a calibration depends on: every stage with its resources, but not where the islands are."""
    return fingerprint("calibration", compute.stages, {stage.name: stage.fingerprint for stage in graph})


def find_calibration(run: RunFolder, graph: Sequence[Stage], compute: ComputeConfig) -> tuple[Calibration | None, str]:
    """The calibration of this very configuration, and a sentence about it, or about how to get one."""
    if not run.calibration.is_file():
        return None, "Times and prices need a calibration: run the same with --calibrate (under a minute)."
    found = TypeAdapter(Calibration).validate_python(read_json(run.calibration))
    if found.fingerprint != identity(graph, compute):
        return None, f"{run.calibration} is of another configuration: run the same with --calibrate again."
    machines = "; ".join(f"{name}: {_describe(place)}" for name, place in found.places.items())
    return found, f"Calibrated {found.created} ({machines})."


def _describe(place: Place) -> str:
    """The machine, and what would make its figures worse than they need be."""
    busy = f", busy: it gave {place.cpu_share:.0%} of its CPUs, so it may be quicker than this says"
    words = f"{place.machine}{busy if place.cpu_share < BUSY else ''}"
    return f"{words}, not measured: {place.problem}" if place.problem else words


def calibrate(config: RunConfig) -> None:
    """Measure in a process of its own, since this one must not import torch; raises `CalibrationFailed`."""
    command = [sys.executable, "-m", "orchestrator.planning.calibrate"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(to_jsonable(config)),
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CalibrationFailed(f"the calibration took more than {LONGEST_S:g} s and was ended") from None
    if done.returncode:
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise CalibrationFailed(f"the calibration failed: {last}")
