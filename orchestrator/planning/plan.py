"""`plan`: what a run would do, where, how long it would take and what it would cost; runs nothing.

A finished stage shows its measured cost. FLOPs and memory of trainings are counted without a calibration. Times are
estimates: units of work times measured speeds, plus expected losses, simulated with the run's own placement on a
virtual clock. Transfers take no time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ddm_core.artifacts import read_manifest
from orchestrator.config.compute import CONTROLLER
from orchestrator.config.schema import RunConfig
from orchestrator.pipeline.graph import build_graph
from orchestrator.pipeline.stage import Stage
from orchestrator.planning.calibration import Calibration, find_calibration
from orchestrator.planning.checks.check import check_run
from orchestrator.planning.checks.data_sizes import DataSize, measure_data
from orchestrator.planning.estimate import Estimate, estimate_stage, training_config
from orchestrator.planning.simulate import PlannedExecution, critical_path, simulate_run
from orchestrator.planning.synchronous_baseline import BaselineComparison, compare_with_synchronous
from orchestrator.planning.transfers import Transfer, estimate_transfers, input_name
from orchestrator.run.run_folder import RunFolder

if TYPE_CHECKING:
    from orchestrator.planning.network_sizes import TrainingSize


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """One row of the plan; None is unknown, or does not apply."""

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
    """An island, or `controller`; for a finished stage the host that ran it."""
    parameters: int | None = None
    """Of the network that it trains."""
    memory_bytes: int | None = None
    """Of a training at its peak, on its device: parameters, gradients, optimizer, average and activations."""
    host_bytes: int = 0
    """Of a training on another device than the CPU, on its host."""
    flops: float | None = None
    least_s: float | None = None
    """Of a training, at this machine's rate of matrix products; None if its device is not here."""
    is_upper_bound: bool = False
    """Whether FLOPs and time are those of the worst case."""
    starts_s: float | None = None
    """Seconds from now."""
    ends_s: float | None = None
    estimate: Estimate | None = None
    movement: Transfer = Transfer()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The stages of a run, its duration and its price."""

    name: str
    folder: str
    backend: str
    islands: tuple[str, ...]
    stages: tuple[PlannedStage, ...]
    seconds: float | None
    """Until the last stage ends; None without a calibration."""
    critical_path_s: float | None
    """The duration with unlimited islands."""
    price: float
    """Of all stages on islands, with expected losses."""
    unknown: tuple[str, ...]
    """Stages of unknown duration, which count as 0 in the sums."""
    comparison: BaselineComparison | None
    """With one monolith on one synchronous Ray cluster."""
    calibration: str
    """Time and place of the calibration, or how to get one."""
    data: tuple[DataSize, ...] = ()
    """Disk and memory of the stages that read images."""


def plan_run(config: RunConfig, run: RunFolder) -> Plan:
    """Compute the plan of a run; raises `ConfigError` if it cannot succeed, or a stage fits nowhere."""
    survey = check_run(config, run)
    graph = build_graph(config)
    finished = {stage.name for stage in graph if run.is_finished(stage)}
    unfinished = [stage for stage in graph if stage.name not in finished]
    sizes = _measure_trainings(unfinished, config, len(survey.class_counts) if survey else 0)
    calibration, calibration_text = find_calibration(run, graph, config.compute)
    estimator = _Estimator(config, calibration)
    executions = simulate_run(graph, finished, config.compute, estimator.seconds, estimator.start_s())
    by_stage = {execution.stage: execution for execution in executions}
    transfers = estimate_transfers(run, graph, executions, calibration.bytes if calibration else {})
    stages = tuple(
        _plan_stage(run, stage, by_stage.get(stage.name), estimator, transfers, sizes.get(stage.name))
        for stage in graph
    )
    unknown = tuple(row.name for row in stages if row.state != "finished" and row.estimate is None)
    durations = {execution.stage: execution.ends_s - execution.starts_s for execution in executions}
    comparison = None
    if calibration:
        comparison = compare_with_synchronous(config, calibration, estimator.seconds, estimator.start_s())
    return Plan(
        name=config.name,
        folder=str(run.root),
        backend=config.compute.backend,
        islands=tuple(config.compute.islands),
        stages=stages,
        seconds=max((execution.ends_s for execution in executions), default=0.0) if calibration else None,
        critical_path_s=critical_path(graph, finished, durations) if calibration else None,
        price=sum(row.estimate.price for row in stages if row.estimate is not None),
        unknown=unknown if calibration else (),
        comparison=comparison,
        calibration=calibration_text,
        data=measure_data(config),
    )


def _measure_trainings(graph: Sequence[Stage], config: RunConfig, num_classes: int) -> "dict[str, TrainingSize]":
    """Measure the trainings; the import of torch and diffusers comes after the checks, which answer at once."""
    if not any(training_config(stage) for stage in graph):
        return {}
    from orchestrator.planning.network_sizes import measure_trainings

    return measure_trainings(graph, config, num_classes)


class _Estimator:
    """Estimates durations; without a calibration only relative ones, which suffice to choose islands."""

    def __init__(self, config: RunConfig, calibration: Calibration | None) -> None:
        self.config, self.calibration = config, calibration

    def estimate(self, stage: Stage, place: str) -> Estimate | None:
        """Estimate a stage at a place; None if its duration is unknown."""
        return estimate_stage(stage, place, self.config.compute, self.calibration) if self.calibration else None

    def seconds(self, stage: Stage, place: str) -> float:
        """Return a stage's duration with expected losses; 0 if it is unknown."""
        if self.calibration is None:
            training = training_config(stage)
            return float(training.steps * training.batch_size) if training else 0.0
        estimate = self.estimate(stage, place)
        return 0.0 if estimate is None else estimate.seconds + estimate.extra_s

    def start_s(self) -> Mapping[str, float]:
        """Return the time that a new process takes to start at each place."""
        places = self.calibration.places if self.calibration else {}
        return {name: place.start_s for name, place in places.items()}


def _plan_stage(
    run: RunFolder,
    stage: Stage,
    execution: PlannedExecution | None,
    estimator: _Estimator,
    transfers: Mapping[str, Transfer],
    size: "TrainingSize | None",
) -> PlannedStage:
    resources, calibration = stage.resources, estimator.calibration
    row = PlannedStage(
        name=stage.name,
        kind=stage.kind,
        state="finished",
        reads=tuple(input_name(artifact) for artifact in stage.inputs.values()),
        cpus=resources.cpus,
        gpus=resources.gpus,
        workers=resources.workers,
        fingerprint=stage.fingerprint,
        place="",
    )
    if execution is None:
        manifest = read_manifest(run.artifact(stage))
        measured = Estimate(seconds=manifest.seconds)
        return replace(row, place=manifest.island or CONTROLLER, flops=manifest.flops, estimate=measured)
    row = replace(row, state="would run", place=execution.place, movement=transfers[stage.name])
    if size is not None:
        training = training_config(stage)
        row = replace(
            row,
            parameters=size.parameters,
            memory_bytes=size.memory_bytes,
            flops=size.flops,
            host_bytes=size.host_bytes(training.device) if training else 0,
            least_s=size.least_seconds(training.device, resources.cpus * resources.workers) if training else None,
        )
    if calibration is None:
        return row
    work = calibration.work[stage.name]
    return replace(
        row,
        flops=work.flops,
        is_upper_bound=work.is_upper_bound,
        starts_s=execution.starts_s,
        ends_s=execution.ends_s,
        estimate=estimator.estimate(stage, execution.place),
    )
