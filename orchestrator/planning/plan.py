"""`plan`: what a run would do, where, how long it would take and what it would cost; runs nothing, imports no torch.

A finished stage shows what it took. Everything else is an estimate: units of work times measured speeds, expected
losses included, walked through the run's own placement on a virtual clock. Moving bytes is not given any time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from pydantic import TypeAdapter

from ddm_core.artifacts import read_manifest
from orchestrator.config.compute import CONTROLLER
from orchestrator.config.schema import RunConfig
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import Stage
from orchestrator.planning.calibration import Calibration, find_calibration
from orchestrator.planning.estimate import Estimate, estimate, training_config
from orchestrator.planning.simulate import PlannedExecution, critical_path, simulate_run
from orchestrator.planning.synchronous_baseline import BaselineComparison, compare
from orchestrator.planning.transfers import Transfer, estimate_transfers, name_of
from orchestrator.run.run_folder import RunFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """One row of the plan; None is not known, or does not apply."""

    name: str
    kind: str
    state: str
    """`finished` or `would run`."""
    reads: tuple[str, ...]
    """Artifacts, or parts of them."""
    cpus: int
    gpus: float
    workers: int
    fingerprint: str
    place: str
    """An island, or `home`; for a finished stage the host that ran it."""
    flops: float | None = None
    is_upper_bound: bool = False
    """Whether the FLOPs and the time are those of the worst case."""
    starts_s: float | None = None
    """Seconds from now."""
    ends_s: float | None = None
    estimate: Estimate | None = None
    movement: Transfer = Transfer()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run would take."""

    name: str
    folder: str
    backend: str
    islands: tuple[str, ...]
    stages: tuple[PlannedStage, ...]
    seconds: float | None
    """Until the last stage ends; None without a calibration."""
    critical_path_s: float | None
    """What no number of islands could shorten."""
    price: float
    """Of all stages on islands, with expected losses."""
    unknown: tuple[str, ...]
    """Stages whose time is not known and counts as nothing in the sums."""
    comparison: BaselineComparison | None
    """With one monolith on one synchronised Ray cluster."""
    calibration: str
    """When and where it was measured, or how to do that."""


def plan(config: RunConfig, run: RunFolder) -> Plan:
    """Everything that can be told before the run; raises `ConfigError` if a stage would find no room."""
    graph = build_graph(config)
    finished = {stage.name for stage in graph if run.finished(stage)}
    calibration, said = find_calibration(run, graph, config.compute)
    guess = _Guess(config, calibration)
    visits = simulate_run(graph, finished, config.compute, guess.seconds, guess.start_s())
    at = {visit.stage: visit for visit in visits}
    moved = estimate_transfers(run, graph, visits, calibration.bytes if calibration else {})
    stages = tuple(_row(run, stage, at.get(stage.name), guess, moved) for stage in graph)
    unknown = tuple(row.name for row in stages if row.state != "finished" and row.estimate is None)
    lasting = {visit.stage: visit.ends_s - visit.starts_s for visit in visits}
    return Plan(
        name=config.name,
        folder=str(run.root),
        backend=config.compute.backend,
        islands=tuple(config.compute.islands),
        stages=stages,
        seconds=max((visit.ends_s for visit in visits), default=0.0) if calibration else None,
        critical_path_s=critical_path(graph, finished, lasting) if calibration else None,
        price=sum(row.estimate.price for row in stages if row.estimate is not None),
        unknown=unknown if calibration else (),
        comparison=compare(config, calibration, guess.seconds, guess.start_s()) if calibration else None,
        calibration=said,
    )


def as_json(found: Plan) -> str:
    """The plan for other programs; what would never end is null."""
    return TypeAdapter(Plan).dump_json(found, indent=1).decode()


class _Guess:
    """How long stages last; without a calibration only in proportion, so that islands can be chosen."""

    def __init__(self, config: RunConfig, calibration: Calibration | None) -> None:
        self.config, self.calibration = config, calibration

    def of(self, stage: Stage, place: str) -> Estimate | None:
        """None if it is not known."""
        return estimate(stage, place, self.config.compute, self.calibration) if self.calibration else None

    def seconds(self, stage: Stage, place: str) -> float:
        """With what losses are expected to add."""
        if self.calibration is None:
            training = training_config(stage)
            return float(training.steps * training.batch_size) if training else 0.0
        found = self.of(stage, place)
        return 0.0 if found is None else found.seconds + found.extra_s

    def start_s(self) -> Mapping[str, float]:
        """How long a new process takes at each place."""
        places = self.calibration.places if self.calibration else {}
        return {name: place.start_s for name, place in places.items()}


def _row(
    run: RunFolder, stage: Stage, visit: PlannedExecution | None, guess: _Guess, moved: Mapping[str, Transfer]
) -> PlannedStage:
    asked, calibration = stage.resources, guess.calibration
    row = PlannedStage(
        name=stage.name,
        kind=stage.kind,
        state="finished",
        reads=tuple(name_of(given) for given in stage.inputs.values()),
        cpus=asked.cpus,
        gpus=asked.gpus,
        workers=asked.workers,
        fingerprint=stage.fingerprint,
        place="",
    )
    if visit is None:
        manifest = read_manifest(run.artifact(stage))
        took = Estimate(seconds=manifest.seconds)
        return replace(row, place=manifest.island or CONTROLLER, flops=manifest.flops, estimate=took)
    row = replace(row, state="would run", place=visit.place, movement=moved[stage.name])
    if calibration is None:
        return row
    work = calibration.work[stage.name]
    return replace(
        row,
        flops=work.flops,
        is_upper_bound=work.is_upper_bound,
        starts_s=visit.starts_s,
        ends_s=visit.ends_s,
        estimate=guess.of(stage, visit.place),
    )
