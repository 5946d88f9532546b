"""How far it carries (`make bench-scale`).

1. The controller's own cost: stages of no work, inline, on Ray and on simulated islands, 10 to 10,000 of them.
2. On paper and in simulation: 8 to 1,000 islands on spot nodes, against one synchronised monolith on the same nodes.
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks.record import RESULTS, Claim, Listing, write_result
from benchmarks.simulation import Outcome as Simulated
from benchmarks.simulation import World, averaged, islands, monolith
from ddm_core.artifacts import publish
from orchestrator.backends.inline import InlineBackend
from orchestrator.config.compute import ComputeConfig, IslandConfig
from orchestrator.controller import shield
from orchestrator.islands.placement import load_of, place
from orchestrator.pipeline.graph import NothingConfig
from orchestrator.pipeline.stage import Stage
from orchestrator.run.backend import AttemptOutcome, Backend, Job
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.runner import Runner

SIZES = (10, 100, 1000, 10_000)
SIMULATED_ISLANDS = 16
Where = Literal["inline", "ray", "islands"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """What one walk over so many stages of no work cost."""

    where: str
    stages: int
    stage_ms: float
    """Wall time of the walk for each stage."""
    memory_mb: float
    """Growth of the controller's resident memory during the walk."""


class SimulatedIslands:
    """Islands without Ray: the real placement, and artifacts that are published as soon as they are asked for."""

    def __init__(self, config: ComputeConfig) -> None:
        self.config = config
        self.running: dict[str, list[Job]] = {name: [] for name in config.islands}

    def place(self, job: Job) -> str | None:
        """By the same rule as on real islands."""
        loads = {name: load_of(jobs) for name, jobs in self.running.items()}
        return place(job, self.config, loads)

    def submit(self, job: Job) -> None:
        """Keep the job until it is asked for."""
        self.running[job.island].append(job)

    def attach(self, job: Job) -> bool:
        """Nothing outlives this process."""
        return False

    def poll(self, timeout_s: float) -> list[AttemptOutcome]:
        """Every job ends at once."""
        ended = [job for jobs in self.running.values() for job in jobs]
        self.running = {name: [] for name in self.running}
        return [_ended(job) for job in ended]

    def kill(self, stage: str) -> None:
        """Nothing runs long enough."""

    def close(self) -> None:
        """Nothing was started."""


def _ended(job: Job) -> AttemptOutcome:
    publish(Path(job.artifact), lambda out: 0.0, stage=job.stage, config=job.config, inputs=job.input_fingerprints)
    return AttemptOutcome(stage=job.stage, attempt=job.attempt, state="finished", started=time.time())


def walk(where: Where, count: int, folder: Path) -> Walk:
    """Walk over stages of no work, in a process of its own so that memory is counted from the same start."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_walk, (where, count, folder))


def _walk(where: Where, count: int, folder: Path) -> Walk:
    kind = "expert" if where == "islands" else "nothing"
    graph = [Stage(name=f"nothing_{n}", kind=kind, config=NothingConfig(number=n)) for n in range(count)]
    config = _compute(where)
    backend = _backend(where, config, graph)
    root = Path(tempfile.mkdtemp(dir=folder))
    before = _memory_mb()
    started = time.perf_counter()
    result = Runner(run=RunFolder(root), graph=graph, backend=backend, policy=config).run_to_end()
    seconds, after = time.perf_counter() - started, _memory_mb()
    backend.close()
    shutil.rmtree(root)
    if len(result.finished) != count:
        raise RuntimeError(f"{where}: {len(result.finished)} of {count} stages finished: {result.failed}")
    return Walk(where=where, stages=count, stage_ms=1000 * seconds / count, memory_mb=after - before)


def _compute(where: Where) -> ComputeConfig:
    if where != "islands":
        return ComputeConfig(backend=where)
    one = IslandConfig(address="http://127.0.0.1:1", token_file="none", storage="/none", cpus=4)  # noqa: S106
    return ComputeConfig(backend=where, islands={f"island_{n}": one for n in range(SIMULATED_ISLANDS)})


def _backend(where: Where, config: ComputeConfig, graph: Sequence[Stage]) -> Backend:
    """The backend, warm: its imports are not the stages' cost."""
    if where == "islands":
        return SimulatedIslands(config)
    if where == "inline":
        import orchestrator.run.worker  # noqa: F401 - what a stage would import first of all

        return InlineBackend()
    shield(None)
    from orchestrator.backends.ray_tasks import RayBackend

    backend = RayBackend(config)
    with tempfile.TemporaryDirectory() as folder:
        Runner(run=RunFolder(Path(folder)), graph=list(graph[:8]), backend=backend, policy=config).run_to_end()
    return backend


def _memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def controller_claims(walks: Sequence[Walk]) -> list[Claim]:
    """At most 5 and 50 ms a stage at 1,000 stages, and no more at 10,000 than at 1,000."""
    at = {(one.where, one.stages): one for one in walks}
    claims = [
        Claim(
            name=f"controller, 1,000 stages of no work, {where}",
            bar=f"≤ {bar} ms a stage",
            value=f"{at[where, 1000].stage_ms:.2f} ms",
            spread="; ".join(f"{one.stages:,}: {one.stage_ms:.2f}" for one in walks if one.where == where),
            holds=at[where, 1000].stage_ms <= bar,
        )
        for where, bar in (("inline", 5), ("ray", 50))
    ]
    growth = {where: at[where, 10_000].stage_ms / at[where, 1000].stage_ms for where in ("inline", "islands")}
    memory = {where: at[where, 10_000].memory_mb for where in ("inline", "islands")}
    claims.append(
        Claim(
            name="time and memory grow linearly, 1,000 to 10,000 stages",
            bar="time a stage at 10,000 ≤ 1.25 x at 1,000; memory ≤ 300 MB",
            value=", ".join(f"{where} {ratio:.2f} x" for where, ratio in growth.items()),
            spread=", ".join(f"{where} {mb:.0f} MB" for where, mb in memory.items()),
            holds=max(growth.values()) <= 1.25 and max(memory.values()) <= 300,
        )
    )
    return claims


def controller_listing(walks: Sequence[Walk]) -> Listing:
    """All walks."""
    rows = [(one.where, f"{one.stages:,}", f"{one.stage_ms:.2f}", f"{one.memory_mb:.0f}") for one in walks]
    columns = ("backend", "stages", "ms a stage", "memory it grew by, MB")
    return Listing(title="Controller, stages of no work", columns=columns, rows=rows)


def measured_world() -> tuple[World, list[str]]:
    """The simulation's assumptions, with what `benchmarks.reliability` has measured put in."""
    world, notes = World(nodes=1), []
    path = RESULTS / "reliability.json"
    figures = json.loads(path.read_text(encoding="utf-8")).get("figures", {}) if path.is_file() else {}
    if "restart_s" in figures:
        world = replace(world, restart_s=figures["restart_s"])
        notes.append(f"Measured (`make chaos`): {figures['restart_s']:.1f} s from resubmission to the first new step.")
    return world, notes


def simulate(world: World, seeds: int) -> tuple[list[Claim], list[Listing]]:
    """Both sides for every number of nodes and every rate of losses."""
    rows, gains = [], []
    for nodes in (8, 32, 100, 316, 1000):
        for rate in (0.0, 0.01, 0.05, 0.2):
            here = replace(world, nodes=nodes, preemptions_per_hour=rate)
            ours = averaged([islands(here, seed) for seed in range(seeds)])
            spot = averaged([monolith(here, seed, spot=True) for seed in range(seeds)])
            firm = monolith(here, 0, spot=False)
            rows.append(
                (f"{nodes:,}", f"{rate:g}", *(cell for one in (ours, spot, firm) for cell in _cells(one, nodes)))
            )
            gains.append((nodes, rate, ours, spot, firm))
    columns = ("islands", "losses/h", *(f"{side} {what}" for side in SIDES for what in ("hours", "goodput", "cost")))
    worst = min(gains, key=lambda row: row[2].goodput)
    usual = next(row for row in gains if row[:2] == (1000, 0.05))
    claim = Claim(
        name="simulation: 8 to 1,000 islands on spot nodes against a synchronised monolith",
        bar="reported, assumptions stated",
        value=f"goodput of the islands ≥ {worst[2].goodput:.3f} ({worst[0]:,} islands, {worst[1]:g} losses/h)",
        spread=f"1,000 islands, .05 losses/h: {usual[2].hours:.0f} h at {usual[2].cost / usual[4].cost:.2f} x the cost "
        f"of the monolith on demand ({usual[4].hours:.0f} h); the monolith on spot: goodput {usual[3].goodput:.2f}",
        holds=True,
    )
    return [claim], [
        Listing(title=f"Simulation, {seeds} seeds, cost in on-demand node-hours a node", columns=columns, rows=rows)
    ]


SIDES = ("islands", "monolith on spot", "monolith on demand")


def _cells(one: Simulated, nodes: int) -> tuple[str, str, str]:
    return f"{one.hours:.1f}", f"{one.goodput:.3f}", f"{one.cost / nodes:.1f}"


def assumptions(world: World) -> str:
    """The world in one paragraph."""
    return (
        f"Assumed: {world.work_h:g} h of work for each expert, and for the monolith on all nodes; a new node after "
        f"{world.provision_s:g} s; {world.restart_s:g} s from a node to the first step; checkpoints of "
        f"{world.checkpoint_gb:g} GB, {world.node_gb_s:g} GB/s a node and {world.store_gb_s:g} GB/s for all; spot at "
        f"{world.spot_price:g} and nodes with a fast fabric at {world.fabric_price:g} of an on-demand node; losses are "
        "Poisson and independent; both sides save at Young's and Daly's interval; the monolith waits for the lost "
        "node, and its nodes are paid meanwhile; it is given a perfect interconnect and no stragglers."
    )


def main() -> None:
    """Measure, simulate, write docs/benchmarks/scale.json and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="seeds of every simulated training")
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ddm-scale-") as folder:
        plan: list[tuple[Where, int]] = [("inline", n) for n in SIZES]
        plan += [("ray", n) for n in SIZES[:3]] + [("islands", n) for n in SIZES]
        walks = []
        for where, count in plan:
            walks.append(walk(where, count, Path(folder)))
            print(walks[-1], flush=True)
    world, notes = measured_world()
    claims, listings = simulate(world, given.seeds)
    result = write_result(
        "scale",
        time.monotonic() - started,
        [*controller_claims(walks), *claims],
        [controller_listing(walks), *listings],
        [assumptions(world), *notes],
    )
    for claim in result["claims"]:
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.name}: {claim.value} ({claim.spread})")


if __name__ == "__main__":
    main()
