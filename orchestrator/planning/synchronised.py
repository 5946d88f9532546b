"""The other way to use the same machines: one monolith, data-parallel over all of them, on one Ray cluster."""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.planning.risk import expected_seconds

COMMUNICATION_SHARE = 0.1
"""The part of a step that all-reduce may take."""

BYTES_PER_PARAMETER = 4

FORMULA = "2 × parameters × 4 bytes × (n - 1)/n sent by each of n workers every step, in 10 % of a step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A machine, or the part of one, that could train one expert."""

    images_per_s: float
    price_per_hour: float = 0.0
    losses_per_hour: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Synchronised:
    """What the monolith would take there."""

    workers: int
    step_s: float
    """Without communication; the slowest worker decides."""
    seconds: float
    """All steps, if the network is as quick as it must be."""
    expected_s: float
    """With losses: one worker's loss sends all of them back to the last checkpoint."""
    price: float
    """All workers, held for the expected time."""
    bytes_per_step: float
    """That each worker sends, and receives, every step."""
    bits_per_s: float
    """The bandwidth that each worker needs for it, to every other site."""
    total_bytes: float
    """That all workers send in the whole training."""


def all_reduce_bytes(parameters: int, workers: int) -> float:
    """What one worker sends a step: 2 * parameters * 4 bytes * (n - 1) / n, of a ring.

    Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002: no all-reduce sends less.
    """
    return 2 * parameters * BYTES_PER_PARAMETER * (workers - 1) / workers


def synchronise(
    workers: Sequence[Worker],
    *,
    parameters: int,
    batch_size: int,
    steps: int,
    checkpoint_every: int,
    restart_s: float,
) -> Synchronised:
    """One training of so many steps with the global batch divided equally among the workers."""
    count = len(workers)
    step_s = batch_size / count / min(worker.images_per_s for worker in workers)
    sent = all_reduce_bytes(parameters, count)
    losses = sum(worker.losses_per_hour for worker in workers)
    expected_s = expected_seconds(steps * step_s, checkpoint_every * step_s, losses, restart_s)
    return Synchronised(
        workers=count,
        step_s=step_s,
        seconds=steps * step_s,
        expected_s=expected_s,
        price=sum(worker.price_per_hour for worker in workers) * expected_s / 3600,
        bytes_per_step=sent,
        bits_per_s=8 * sent / (COMMUNICATION_SHARE * step_s),
        total_bytes=sent * count * steps,
    )
