"""A discrete-event simulation of training on many islands, and of one synchronised monolith on the same nodes.

Both sides have the same nodes, the same work in node-hours, the same spot market and the same object store. They differ
in what a lost node stops: one expert, or everybody. Each side saves at its own best interval (Young 1974, Daly 2006):

    interval = sqrt(2 * save_s * mean time between the losses that stop it)
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
    """What is assumed; every figure that a benchmark here has measured is marked so where it is set."""

    nodes: int
    """Islands of one node each; one expert an island."""
    work_h: float = 48.0
    """Hours of undisturbed training for each expert, and for the monolith on all nodes."""
    preemptions_per_hour: float = 0.05
    """How often a spot node is taken away."""
    provision_s: float = 300.0
    """From the loss of a node to a new one."""
    restart_s: float = 10.0
    """From a new node to the first new step, the checkpoint's way not counted."""
    checkpoint_gb: float = 10.0
    """Parameters, average and optimiser of one model (0.6 billion parameters in float32, 16 bytes each)."""
    node_gb_s: float = 1.0
    """What one node writes to or reads from the object store in a second."""
    store_gb_s: float = 50.0
    """What the object store gives to all nodes together."""
    controller_s: float = 0.0
    """Time of the controller for one submission; it handles one at a time."""
    spot_price: float = 0.35
    """Price of a spot node by the hour, with an on-demand node at 1."""
    fabric_price: float = 1.25
    """Price of an on-demand node with the interconnect that synchronous training needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one simulated training went."""

    hours: float
    goodput: float
    """Useful node-hours over paid node-hours."""
    cost: float
    """In on-demand node-hours."""
    losses: int


class _Islands:
    """Every expert trains, is lost and goes on by itself; they share the object store and the controller."""

    def __init__(self, world: World, draw: random.Random) -> None:
        self.world, self.draw = world, draw
        self.clock = simpy.Environment()
        self.lanes = simpy.Resource(self.clock, capacity=max(1, int(world.store_gb_s / world.node_gb_s)))
        self.controller = simpy.Resource(self.clock, capacity=1)
        self.paid_s, self.losses, self.ended_s = 0.0, 0, [0.0] * world.nodes

    def run(self) -> Outcome:
        """Simulate until the last expert is done."""
        for number in range(self.world.nodes):
            self.clock.process(self._expert(number))
        self.clock.run()
        useful = self.world.work_h * self.world.nodes
        paid = self.paid_s / HOUR
        return Outcome(
            hours=max(self.ended_s) / HOUR,
            goodput=useful / paid,
            cost=paid * self.world.spot_price,
            losses=self.losses,
        )

    def _expert(self, number: int) -> Generator[simpy.Event, None, None]:
        world, clock = self.world, self.clock
        transfer_s = world.checkpoint_gb / world.node_gb_s
        interval = best_interval_s(transfer_s, world.preemptions_per_hour)
        done, started = 0.0, False
        while done < world.work_h * HOUR:
            with self.controller.request() as turn:
                yield turn
                yield clock.timeout(world.controller_s)
            lost_at = clock.now + self._lifetime()
            begun = clock.now
            yield clock.timeout(world.restart_s)
            if started:
                yield from self._transfer(transfer_s)
            started = True
            while clock.now < lost_at and done < world.work_h * HOUR:
                piece = min(interval, world.work_h * HOUR - done)
                yield clock.timeout(min(piece, lost_at - clock.now))
                if clock.now < lost_at:
                    yield from self._transfer(transfer_s)
                    done += piece if clock.now < lost_at else 0.0
            self.paid_s += min(clock.now, lost_at) - begun
            if done < world.work_h * HOUR:
                self.losses += 1
                yield clock.timeout(world.provision_s)
        self.ended_s[number] = clock.now

    def _transfer(self, seconds: float) -> Generator[simpy.Event, None, None]:
        with self.lanes.request() as lane:
            yield lane
            yield self.clock.timeout(seconds)

    def _lifetime(self) -> float:
        rate = self.world.preemptions_per_hour / HOUR
        return self.draw.expovariate(rate) if rate else math.inf


def islands(world: World, seed: int) -> Outcome:
    """Independent experts on spot nodes."""
    return _Islands(world, random.Random(seed)).run()


def monolith(world: World, seed: int, *, spot: bool) -> Outcome:
    """One model on all nodes in step: any lost node stops all of them until it is replaced.

    On demand, nothing is lost and the fabric is paid for; on spot the nodes are cheap and every loss costs everybody.
    """
    draw, losses, now, done = random.Random(seed), 0, 0.0, 0.0
    rate = world.nodes * world.preemptions_per_hour / HOUR if spot else 0.0
    save_s = world.checkpoint_gb / world.node_gb_s / min(world.nodes, world.store_gb_s / world.node_gb_s)
    interval = best_interval_s(save_s, rate * HOUR)
    goal, limit = world.work_h * HOUR, 50 * world.work_h * HOUR
    while done < goal and now < limit:
        lost_at = now + (draw.expovariate(rate) if rate else math.inf)
        now += world.restart_s + (save_s if losses else 0.0)
        while now < lost_at and done < goal:
            piece = min(interval, goal - done)
            now += piece + save_s
            done += piece if now <= lost_at else 0.0
        if done < goal:
            now, losses = max(now if now < lost_at else lost_at, lost_at) + world.provision_s, losses + 1
    paid = now / HOUR * world.nodes
    price = world.spot_price if spot else world.fabric_price
    return Outcome(
        hours=now / HOUR if done >= goal else math.inf,
        goodput=min(done, goal) / HOUR * world.nodes / paid,
        cost=paid * price if done >= goal else math.inf,
        losses=losses,
    )


def averaged(outcomes: list[Outcome]) -> Outcome:
    """Means over seeds."""
    return Outcome(
        hours=mean(one.hours for one in outcomes),
        goodput=mean(one.goodput for one in outcomes),
        cost=mean(one.cost for one in outcomes),
        losses=round(mean(one.losses for one in outcomes)),
    )
