"""Discrete-event simulation of training on many islands, and of one synchronous monolith on the same nodes.

Both sides have the same nodes, the same work in node-hours, the same spot market and the same object store. A lost
node stops one expert on islands, but all nodes of the monolith. Each side saves at its best interval (Young 1974,
Daly 2006):

    interval = sqrt(2 * save_s * mean time between losses that stop that side)
"""

import math
import random
from collections.abc import Generator
from dataclasses import dataclass
from statistics import mean

import simpy

from orchestrator.planning.estimate import best_interval_s

HOUR = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Assumptions of the simulation; `benchmarks.scale` replaces those that a benchmark has measured."""

    nodes: int
    """Number of islands; each has one node and trains one expert."""
    work_h: float = 48.0
    """Hours of undisturbed training for each expert, and for the monolith on all nodes."""
    preemptions_per_hour: float = 0.05
    """Preemption rate of a spot node."""
    provision_s: float = 300.0
    """From the loss of a node to its replacement."""
    restart_s: float = 10.0
    """From a new node to the first new step, without the transfer of the checkpoint."""
    checkpoint_gb: float = 10.0
    """Parameters, average and optimizer of one model (0.6 billion parameters in float32, 16 bytes each)."""
    node_gb_s: float = 1.0
    """Bandwidth between one node and the object store."""
    store_gb_s: float = 50.0
    """Total bandwidth of the object store."""
    controller_s: float = 0.0
    """Time of the controller per submission; it handles one submission at a time."""
    spot_price: float = 0.35
    """Hourly price of a spot node, relative to an on-demand node."""
    fabric_price: float = 1.25
    """Relative price of an on-demand node with the interconnect that synchronous training needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRun:
    """Result of one simulated training."""

    hours: float
    goodput: float
    """Useful node-hours over paid node-hours."""
    cost: float
    """In on-demand node-hours."""
    losses: int


class _Islands:
    """Experts train, fail and resume independently; they share the object store and the controller."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world, self.rng = world, rng
        self.clock = simpy.Environment()
        self.lanes = simpy.Resource(self.clock, capacity=max(1, int(world.store_gb_s / world.node_gb_s)))
        self.controller = simpy.Resource(self.clock, capacity=1)
        self.paid_s, self.losses, self.ended_s = 0.0, 0, [0.0] * world.nodes

    def run(self) -> SimulatedRun:
        """Simulate until the last expert is finished."""
        for number in range(self.world.nodes):
            self.clock.process(self._expert(number))
        self.clock.run()
        useful = self.world.work_h * self.world.nodes
        paid = self.paid_s / HOUR
        return SimulatedRun(
            hours=max(self.ended_s) / HOUR,
            goodput=useful / paid,
            cost=paid * self.world.spot_price,
            losses=self.losses,
        )

    def _expert(self, number: int) -> Generator[simpy.Event, None, None]:
        world, clock = self.world, self.clock
        transfer_s = world.checkpoint_gb / world.node_gb_s
        interval = best_interval_s(transfer_s, world.preemptions_per_hour)
        done_s, has_checkpoint = 0.0, False
        while done_s < world.work_h * HOUR:
            with self.controller.request() as request:
                yield request
                yield clock.timeout(world.controller_s)
            lost_at = clock.now + self._lifetime()
            started_at = clock.now
            yield clock.timeout(world.restart_s)
            if has_checkpoint:
                yield from self._transfer(transfer_s)
            has_checkpoint = True
            while clock.now < lost_at and done_s < world.work_h * HOUR:
                work_s = min(interval, world.work_h * HOUR - done_s)
                yield clock.timeout(min(work_s, lost_at - clock.now))
                if clock.now < lost_at:
                    yield from self._transfer(transfer_s)
                    done_s += work_s if clock.now < lost_at else 0.0
            self.paid_s += min(clock.now, lost_at) - started_at
            if done_s < world.work_h * HOUR:
                self.losses += 1
                yield clock.timeout(world.provision_s)
        self.ended_s[number] = clock.now

    def _transfer(self, seconds: float) -> Generator[simpy.Event, None, None]:
        with self.lanes.request() as lane:
            yield lane
            yield self.clock.timeout(seconds)

    def _lifetime(self) -> float:
        rate = self.world.preemptions_per_hour / HOUR
        return self.rng.expovariate(rate) if rate else math.inf


def simulate_islands(world: World, seed: int) -> SimulatedRun:
    """Simulate independent experts on spot nodes."""
    return _Islands(world, random.Random(seed)).run()


def simulate_monolith(world: World, seed: int, *, spot: bool) -> SimulatedRun:
    """Simulate one model on all nodes in lockstep: any lost node stops all of them until it is replaced.

    On demand, no node is lost and the fabric costs extra. On spot, nodes are cheap, and every loss stops all nodes.
    """
    rng, losses, now, done_s = random.Random(seed), 0, 0.0, 0.0
    rate = world.nodes * world.preemptions_per_hour / HOUR if spot else 0.0
    save_s = world.checkpoint_gb / world.node_gb_s / min(world.nodes, world.store_gb_s / world.node_gb_s)
    interval = best_interval_s(save_s, rate * HOUR)
    goal_s, limit_s = world.work_h * HOUR, 50 * world.work_h * HOUR
    while done_s < goal_s and now < limit_s:
        lost_at = now + (rng.expovariate(rate) if rate else math.inf)
        now += world.restart_s + (save_s if losses else 0.0)
        while now < lost_at and done_s < goal_s:
            work_s = min(interval, goal_s - done_s)
            now += work_s + save_s
            done_s += work_s if now <= lost_at else 0.0
        if done_s < goal_s:
            now, losses = max(now if now < lost_at else lost_at, lost_at) + world.provision_s, losses + 1
    paid = now / HOUR * world.nodes
    price = world.spot_price if spot else world.fabric_price
    return SimulatedRun(
        hours=now / HOUR if done_s >= goal_s else math.inf,
        goodput=min(done_s, goal_s) / HOUR * world.nodes / paid,
        cost=paid * price if done_s >= goal_s else math.inf,
        losses=losses,
    )


def average_runs(runs: list[SimulatedRun]) -> SimulatedRun:
    """Return the means over seeds."""
    return SimulatedRun(
        hours=mean(run.hours for run in runs),
        goodput=mean(run.goodput for run in runs),
        cost=mean(run.cost for run in runs),
        losses=round(mean(run.losses for run in runs)),
    )
