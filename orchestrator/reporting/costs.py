"""What a run has cost so far: time, CPUs and GPUs, money, bytes, and the work that was lost; from its folder alone.

An attempt costs from its worker's first word to its last. One that ended without an artifact was useful for as long as
the steps took that a later attempt did not have to repeat; all the rest of it is lost, its start included. What is not
a training keeps nothing by this account. An idle island costs nothing here, whatever its owner's bill says.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

from orchestrator.config.compute import CONTROLLER, ComputeConfig, IslandConfig, ResourcesConfig
from orchestrator.reporting.progress import clock
from orchestrator.run.attempts import Attempt, all_attempts
from orchestrator.run.run_folder import RunFolder

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRow:
    """What one stage cost, all its attempts together; or a whole run."""

    stage: str
    attempts: int = 0
    """Those that a worker began."""
    seconds: float = 0.0
    """Time of workers."""
    cpu_seconds: float = 0.0
    """Seconds times the CPUs that were held."""
    gpu_seconds: float = 0.0
    """Seconds times the GPUs that were held."""
    price: float = 0.0
    """In the currency of the islands' prices; home is free."""
    unpriced_s: float = 0.0
    """Seconds on islands that the configuration does not name any more: nobody knows their price."""
    lost_s: float = 0.0
    """Seconds whose work came to nothing."""
    lost_steps: int = 0
    """Training steps that were done again, as far as they were reported."""
    waiting_s: float = 0.0
    """From submission to the worker's first word."""
    bytes_out: int = 0
    """Moved to islands."""
    bytes_in: int = 0
    """Moved back."""

    @property
    def goodput(self) -> float:
        """The share of the seconds that was useful."""
        return 1.0 - self.lost_s / self.seconds if self.seconds else 1.0


def cost_rows(run: RunFolder) -> list[CostRow]:
    """Every stage that was tried here, in the order of their first attempts."""
    compute, events = run.load_config().compute, run.events()
    by_stage: dict[str, list[Attempt]] = defaultdict(list)
    for attempt in all_attempts(run):
        by_stage[attempt.stage].append(attempt)
    waits, moved = _waits(events), _moved(events)
    rows = []
    for stage, attempts in by_stage.items():
        costs = [_cost(attempt, compute, waits) for attempt in attempts]
        lost = [_lost(run, work) for work in _by_work(attempts)]
        rows.append(total([*costs, *lost, *moved.get(stage, [])], stage))
    return rows


def total(rows: Iterable[CostRow], name: str = "total") -> CostRow:
    """The sum of rows."""
    given = list(rows)
    sums = {field.name: sum(getattr(row, field.name) for row in given) for field in fields(CostRow)[1:]}
    return CostRow(stage=name, **sums)


def share_of(island: IslandConfig, asked: ResourcesConfig) -> float:
    """Which part of an island a stage holds: of its CPUs or of its GPUs, whichever is more."""
    cpus = asked.cpus * asked.workers / island.cpus
    return max(cpus, asked.gpus * asked.workers / island.gpus) if island.gpus else cpus


def price_of(island: IslandConfig, asked: ResourcesConfig, seconds: float) -> float:
    """What it costs to hold these resources on an island for so long."""
    return island.price_per_hour * share_of(island, asked) * seconds / 3600


def cost_line(run: RunFolder) -> str:
    """The whole run in one line; empty before its first attempt."""
    rows = cost_rows(run)
    return describe_costs(total(rows)) if rows else ""


def describe_costs(row: CostRow) -> str:
    """A row in words; what is nothing goes unsaid."""
    words = [f"{row.attempts} attempts", f"{clock(row.cpu_seconds)} CPU time"]
    if row.gpu_seconds:
        words.append(f"{clock(row.gpu_seconds)} GPU time")
    if row.price:
        words.append(f"price {row.price:.4g}")
    words.append(f"{clock(row.lost_s)} lost, goodput {row.goodput:.1%}" if row.lost_s else "nothing lost")
    if row.bytes_out or row.bytes_in:
        words.append(f"{size(row.bytes_out)} to islands, {size(row.bytes_in)} back")
    return " · ".join(words)


def size(count: float) -> str:
    """A number of bytes with a metric prefix."""
    power = 0
    while count >= 1000 and power < len(UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {UNITS[power]}"


def _cost(attempt: Attempt, compute: ComputeConfig, waits: dict[tuple[str, int], float]) -> CostRow:
    """What one attempt held, and for how long."""
    asked, island = attempt.resources, compute.islands.get(attempt.island)
    submitted = waits.get((attempt.folder.parent.name, attempt.attempt), attempt.start)
    is_gone = island is None and attempt.island not in ("", CONTROLLER)
    return CostRow(
        stage=attempt.stage,
        attempts=1,
        seconds=attempt.seconds,
        cpu_seconds=attempt.seconds * asked.cpus * asked.workers,
        gpu_seconds=attempt.seconds * asked.gpus * asked.workers,
        price=price_of(island, asked, attempt.seconds) if island else 0.0,
        unpriced_s=attempt.seconds if is_gone else 0.0,
        waiting_s=max(0.0, attempt.start - submitted),
    )


def _by_work(attempts: Sequence[Attempt]) -> list[list[Attempt]]:
    """Attempts that share checkpoints, the first one first."""
    ordered = sorted(attempts, key=lambda attempt: (attempt.folder.parent, attempt.attempt))
    return [list(group) for _, group in groupby(ordered, key=lambda attempt: attempt.folder.parent)]


def _lost(run: RunFolder, attempts: Sequence[Attempt]) -> CostRow:
    """What the attempts lost: everything but the steps that those after them began with."""
    kept, lost_s, lost_steps = _kept_at_last(run, attempts[-1]), 0.0, 0
    paces = [attempt.steps.seconds_each for attempt in attempts if attempt.steps and attempt.steps.seconds_each]
    for attempt in reversed(attempts):
        steps = attempt.steps
        if attempt.state not in ("finished", "running"):
            useful_s, repeated = _useful(attempt, kept, paces)
            lost_s, lost_steps = lost_s + attempt.seconds - useful_s, lost_steps + repeated
        if steps is not None:
            kept = steps.first if attempt is attempts[-1] else min(kept, steps.first)
    return CostRow(stage=attempts[-1].stage, lost_s=lost_s, lost_steps=lost_steps)


def _useful(attempt: Attempt, kept: int, paces: Sequence[float]) -> tuple[float, int]:
    """Seconds that were not in vain, and steps that were, if work up to step `kept` outlived the attempt.

    One that was cut short before it could tell its own pace is taken to have had that of its siblings.
    """
    steps = attempt.steps
    if steps is None:
        return 0.0, 0
    usual = min(paces, default=attempt.seconds / max(1, steps.last - steps.first))
    seconds_each = steps.seconds_each or usual
    useful_s = max(0, kept - steps.first) * seconds_each
    return min(useful_s, attempt.seconds), max(0, steps.last - max(kept, steps.first))


def _kept_at_last(run: RunFolder, latest: Attempt) -> int:
    """The step of the checkpoint that a next attempt would find; 0 if there will be none."""
    if latest.state == "failed":
        return 0
    saved = run.scratch_of(latest.folder).glob("checkpoints/step-*")
    return max((int(path.name.removeprefix("step-")) for path in saved), default=0)


def _waits(events: Sequence[dict[str, Any]]) -> dict[tuple[str, int], float]:
    """When each attempt was submitted."""
    return {
        (f"{event['stage']}-{event['fingerprint'][:12]}", event["attempt"]): event["time"]
        for event in events
        if event["event"] == "submitted"
    }


def _moved(events: Sequence[dict[str, Any]]) -> dict[str, list[CostRow]]:
    """The bytes that crossed, by stage."""
    found: dict[str, list[CostRow]] = defaultdict(list)
    for event in events:
        if event["event"] == "moved":
            crossed = {f"bytes_{event['direction']}": int(event["bytes"])}
            found[event["stage"]].append(CostRow(stage=event["stage"], **crossed))
    return found
