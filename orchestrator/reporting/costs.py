"""Costs of a run so far: time, CPUs, GPUs, money, bytes and lost work; read from its folder alone.

An attempt costs from its worker's first sign of life to its last. If it ends without an artifact, only the time of the
steps that no later attempt repeats is useful. The rest is lost, including its startup. A stage that is no training
keeps nothing of an unfinished attempt. An idle island costs nothing here, even if its owner pays for it.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

from orchestrator.config.compute import CONTROLLER, ComputeConfig, IslandConfig, ResourcesConfig
from orchestrator.reporting.progress import format_clock
from orchestrator.run.attempts import Attempt, Steps, load_all_attempts
from orchestrator.run.run_folder import RunFolder

BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRow:
    """Costs of one stage over all its attempts, or of a run."""

    stage: str
    attempts: int = 0
    """Attempts that a worker started."""
    seconds: float = 0.0
    """Worker time: wall clock, summed over attempts."""
    cpu_seconds: float = 0.0
    """Reserved CPU time: worker time multiplied by the reserved CPUs."""
    used_cpu_s: float = 0.0
    """CPU time that ended attempts used; those that were killed or still run count as 0."""
    gpu_seconds: float = 0.0
    """Reserved GPU time: worker time multiplied by the reserved GPUs."""
    price: float = 0.0
    """In the currency of the islands' prices; the controller's machine is free."""
    unpriced_s: float = 0.0
    """Seconds on islands that the configuration no longer names, so their price is unknown."""
    lost_s: float = 0.0
    """Seconds whose work a later attempt repeats, or that led to no artifact."""
    lost_steps: int = 0
    """Reported training steps that a later attempt repeats."""
    waiting_s: float = 0.0
    """From submission to the worker's first sign of life."""
    bytes_out: int = 0
    """Sent to islands."""
    bytes_in: int = 0
    """Sent back."""

    @property
    def goodput(self) -> float:
        """Return the useful share of the worker time."""
        return 1.0 - self.lost_s / self.seconds if self.seconds else 1.0


def load_costs(run: RunFolder, attempts: Sequence[Attempt] | None = None) -> list[CostRow]:
    """Return the costs of every attempted stage, in the order of their first attempts.

    `attempts` are all of this run folder, if the caller has loaded them already.
    """
    compute, events = run.load_config().compute, run.read_events()
    by_stage: dict[str, list[Attempt]] = defaultdict(list)
    for attempt in load_all_attempts(run) if attempts is None else attempts:
        by_stage[attempt.stage].append(attempt)
    submissions, transfers = _submission_times(events), _transfers(events)
    rows = []
    for stage, tries in by_stage.items():
        costs = [_attempt_cost(attempt, compute, submissions) for attempt in tries]
        lost = [_lost_work(run, group) for group in _group_by_checkpoints(tries)]
        rows.append(sum_costs([*costs, *lost, *transfers.get(stage, [])], stage))
    return rows


def sum_costs(rows: Iterable[CostRow], name: str = "total") -> CostRow:
    """Return the sum of rows, as a row of that name."""
    summands = list(rows)
    sums = {field.name: sum(getattr(row, field.name) for row in summands) for field in fields(CostRow)[1:]}
    return CostRow(stage=name, **sums)


def mean_costs(rows: Sequence[CostRow], name: str = "mean") -> CostRow:
    """Return the mean of some rows, as a row of that name; counts are rounded down."""
    total = sum_costs(rows, name)
    means = {f.name: type(value := getattr(total, f.name))(value / len(rows)) for f in fields(CostRow)[1:]}
    return CostRow(stage=name, **means)


def reserve(attempt: Attempt, compute: ComputeConfig, seconds: float) -> CostRow:
    """Return the time, the devices and the price of what an attempt reserves for so long."""
    resources, island = attempt.resources, compute.islands.get(attempt.island)
    is_gone = island is None and attempt.island not in ("", CONTROLLER)
    return CostRow(
        stage=attempt.stage,
        seconds=seconds,
        cpu_seconds=seconds * resources.cpus * resources.workers,
        gpu_seconds=seconds * resources.gpus * resources.workers,
        price=reservation_price(island, resources, seconds) if island else 0.0,
        unpriced_s=seconds if is_gone else 0.0,
    )


def island_share(island: IslandConfig, resources: ResourcesConfig) -> float:
    """Return the share of an island that a stage reserves: of its CPUs or of its GPUs, whichever is larger."""
    cpus = resources.cpus * resources.workers / island.cpus
    return max(cpus, resources.gpus * resources.workers / island.gpus) if island.gpus else cpus


def reservation_price(island: IslandConfig, resources: ResourcesConfig, seconds: float) -> float:
    """Return the price of reserving these resources on an island for so long."""
    return island.price_per_hour * island_share(island, resources) * seconds / 3600


def format_run_costs(run: RunFolder, attempts: Sequence[Attempt] | None = None) -> str:
    """Return the costs of the run as one line; empty before its first attempt."""
    rows = load_costs(run, attempts)
    return format_costs(sum_costs(rows)) if rows else ""


def format_costs(row: CostRow) -> str:
    """Return a row as text, without the quantities that are zero."""
    parts = [f"{row.attempts} attempts", f"{format_clock(row.cpu_seconds)} of reserved CPU time"]
    if row.used_cpu_s:
        parts.append(f"{format_clock(row.used_cpu_s)} of used CPU time")
    if row.gpu_seconds:
        parts.append(f"{format_clock(row.gpu_seconds)} of reserved GPU time")
    if row.price:
        parts.append(f"price {row.price:.4g}")
    parts.append(f"{format_clock(row.lost_s)} lost, goodput {row.goodput:.1%}" if row.lost_s else "no work done twice")
    if row.bytes_out or row.bytes_in:
        parts.append(f"{format_bytes(row.bytes_out)} to islands, {format_bytes(row.bytes_in)} back")
    return " · ".join(parts)


def format_bytes(count: float) -> str:
    """Return a number of bytes with a metric prefix: 12.3 MB."""
    power = 0
    while count >= 1000 and power < len(BYTE_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {BYTE_UNITS[power]}"


def _attempt_cost(attempt: Attempt, compute: ComputeConfig, submissions: dict[tuple[str, int], float]) -> CostRow:
    """Return the time and the reserved resources of one attempt."""
    submitted = submissions.get((attempt.folder.parent.name, attempt.attempt), attempt.start)
    return replace(
        reserve(attempt, compute, attempt.seconds),
        attempts=1,
        used_cpu_s=attempt.cpu_s,
        waiting_s=max(0.0, attempt.start - submitted),
    )


def _group_by_checkpoints(attempts: Sequence[Attempt]) -> list[list[Attempt]]:
    """Return groups of attempts that share checkpoints, each in order."""
    ordered = sorted(attempts, key=lambda attempt: (attempt.folder.parent, attempt.attempt))
    return [list(group) for _, group in groupby(ordered, key=lambda attempt: attempt.folder.parent)]


def _lost_work(run: RunFolder, attempts: Sequence[Attempt]) -> CostRow:
    """Return what the attempts lost: everything but the steps from which later attempts continued."""
    if all(attempt.state in ("finished", "running") for attempt in attempts):
        return CostRow(stage=attempts[-1].stage)
    saved_step, lost_s, lost_steps = _last_saved_step(run, attempts[-1]), 0.0, 0
    all_steps = [attempt.steps for attempt in attempts]
    paces = [steps.seconds_per_step for steps in all_steps if steps and steps.seconds_per_step]
    for attempt, steps in zip(reversed(attempts), reversed(all_steps), strict=True):
        if attempt.state not in ("finished", "running"):
            useful_s, repeated = _useful_work(attempt, steps, saved_step, paces)
            lost_s, lost_steps = lost_s + attempt.seconds - useful_s, lost_steps + repeated
        if steps is not None:
            saved_step = steps.first if attempt is attempts[-1] else min(saved_step, steps.first)
    return CostRow(stage=attempts[-1].stage, lost_s=lost_s, lost_steps=lost_steps)


def _useful_work(attempt: Attempt, steps: Steps | None, saved_step: int, paces: Sequence[float]) -> tuple[float, int]:
    """Return useful seconds and repeated steps, if work up to `saved_step` survived the attempt.

    An attempt that reported no pace is assumed to have had that of its siblings.
    """
    if steps is None:
        return 0.0, 0
    sibling_pace = min(paces, default=attempt.seconds / max(1, steps.last - steps.first))
    seconds_per_step = steps.seconds_per_step or sibling_pace
    useful_s = max(0, saved_step - steps.first) * seconds_per_step
    return min(useful_s, attempt.seconds), max(0, steps.last - max(saved_step, steps.first))


def _last_saved_step(run: RunFolder, latest: Attempt) -> int:
    """Return the step from which a next attempt would continue; 0 if there will be none."""
    if latest.state == "failed":
        return 0
    checkpoints = run.scratch_of_attempt(latest.folder).glob("checkpoints/step-*")
    return max((int(path.name.removeprefix("step-")) for path in checkpoints), default=0)


def _submission_times(events: Sequence[dict[str, Any]]) -> dict[tuple[str, int], float]:
    """Return the time at which each attempt was submitted, by work folder and number."""
    return {
        (f"{event['stage']}-{event['fingerprint'][:12]}", event["attempt"]): event["time"]
        for event in events
        if event["event"] == "submitted" and {"stage", "fingerprint", "attempt", "time"} <= event.keys()
    }


def _transfers(events: Sequence[dict[str, Any]]) -> dict[str, list[CostRow]]:
    """Return the bytes that were sent, by stage."""
    rows: dict[str, list[CostRow]] = defaultdict(list)
    for event in events:
        if event["event"] == "moved" and {"stage", "direction", "bytes"} <= event.keys():
            sent = {f"bytes_{event['direction']}": int(event["bytes"])}
            rows[event["stage"]].append(CostRow(stage=event["stage"], **sent))
    return rows
