"""Scaling of the controller and of islands (`make bench-scale`).

1. Cost of the controller: 10 to 10,000 empty stages, inline, on Ray and on simulated islands.
2. Simulation: 8 to 1,000 islands on spot nodes, against one synchronous monolith on the same nodes.
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
from benchmarks.testbed.simulation import SimulatedRun, World, average_runs, simulate_islands, simulate_monolith
from ddm_core.artifacts import publish
from orchestrator.backends.inline import InlineBackend
from orchestrator.config.compute import ComputeConfig, IslandConfig
from orchestrator.controller import configure_ray_security
from orchestrator.islands.placement import compute_load, place
from orchestrator.pipeline.stage import Stage
from orchestrator.pipeline.stage_configs import NothingConfig
from orchestrator.run.backend import AttemptOutcome, Backend, Job
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.runner import Runner

SIZES = (10, 100, 1000, 10_000)
SIMULATED_ISLANDS = 16
BackendName = Literal["inline", "ray", "islands"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmptyRun:
    """Cost of one run of empty stages."""

    backend: str
    stages: int
    stage_ms: float
    """Wall-clock time of the run per stage."""
    memory_mb: float
    """Growth of the controller's resident memory during the run."""


class SimulatedIslands:
    """Islands without Ray: with the real placement; `poll` publishes all artifacts immediately."""

    def __init__(self, config: ComputeConfig) -> None:
        self.config = config
        self.running: dict[str, list[Job]] = {name: [] for name in config.islands}

    def place(self, job: Job) -> str | None:
        """Place a job by the same rule as on real islands."""
        loads = {name: compute_load(jobs) for name, jobs in self.running.items()}
        return place(job, self.config, loads)

    def submit(self, job: Job) -> None:
        """Store the job until the next poll."""
        self.running[job.island].append(job)

    def attach(self, job: Job) -> bool:
        """Return False: no job survives this process."""
        return False

    def poll(self, timeout_s: float) -> list[AttemptOutcome]:
        """Finish all jobs immediately."""
        finished = [job for jobs in self.running.values() for job in jobs]
        self.running = {name: [] for name in self.running}
        return [_finish(job) for job in finished]

    def kill(self, stage: str) -> None:
        """Do nothing: no job runs long enough."""

    def close(self) -> None:
        """Do nothing: no process was started."""


def _finish(job: Job) -> AttemptOutcome:
    publish(Path(job.artifact), lambda out: 0.0, stage=job.stage, config=job.config, inputs=job.input_fingerprints)
    return AttemptOutcome(stage=job.stage, attempt=job.attempt, state="finished", started=time.time())


def measure_empty_run(backend_name: BackendName, count: int, folder: Path) -> EmptyRun:
    """Run empty stages in a new process, so that memory growth always starts from the same state."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure_empty_run, (backend_name, count, folder))


def _measure_empty_run(backend_name: BackendName, count: int, folder: Path) -> EmptyRun:
    kind = "expert" if backend_name == "islands" else "nothing"
    graph = [Stage(name=f"nothing_{n}", kind=kind, config=NothingConfig(number=n)) for n in range(count)]
    config = _compute_config(backend_name)
    backend = _create_backend(backend_name, config, graph)
    root = Path(tempfile.mkdtemp(dir=folder))
    before = _memory_mb()
    started = time.perf_counter()
    result = Runner(run=RunFolder(root), graph=graph, backend=backend, policy=config).run_to_end()
    seconds, after = time.perf_counter() - started, _memory_mb()
    backend.close()
    shutil.rmtree(root)
    if len(result.finished) != count:
        raise RuntimeError(
            f"all {count} empty stages must finish; got {len(result.finished)} with the {backend_name} backend; "
            f"check the failed ones: {result.failed}"
        )
    return EmptyRun(backend=backend_name, stages=count, stage_ms=1000 * seconds / count, memory_mb=after - before)


def _compute_config(backend_name: BackendName) -> ComputeConfig:
    if backend_name != "islands":
        return ComputeConfig(backend=backend_name)
    island = IslandConfig(address="http://127.0.0.1:1", token_file="none", storage="/none", cpus=4)  # noqa: S106
    return ComputeConfig(backend=backend_name, islands={f"island_{n}": island for n in range(SIMULATED_ISLANDS)})


def _create_backend(backend_name: BackendName, config: ComputeConfig, graph: Sequence[Stage]) -> Backend:
    """Create a warm backend, so that its imports do not count as cost of the stages."""
    if backend_name == "islands":
        return SimulatedIslands(config)
    if backend_name == "inline":
        import orchestrator.run.worker  # noqa: F401 - the first stage would import it

        return InlineBackend()
    configure_ray_security(None)
    from orchestrator.backends.ray_tasks import RayBackend

    backend = RayBackend(config)
    with tempfile.TemporaryDirectory() as folder:
        Runner(run=RunFolder(Path(folder)), graph=list(graph[:8]), backend=backend, policy=config).run_to_end()
    return backend


def _memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def controller_claims(runs: Sequence[EmptyRun]) -> list[Claim]:
    """Return the claims on time per stage at 1,000 stages, and on its growth up to 10,000."""
    by_size = {(run.backend, run.stages): run for run in runs}
    claims = [
        Claim(
            name=f"controller, 1,000 empty stages, {backend}",
            bar=f"≤ {target_ms} ms per stage",
            value=f"{by_size[backend, 1000].stage_ms:.2f} ms",
            spread="; ".join(f"{run.stages:,}: {run.stage_ms:.2f}" for run in runs if run.backend == backend),
            holds=by_size[backend, 1000].stage_ms <= target_ms,
        )
        for backend, target_ms in (("inline", 5), ("ray", 50))
    ]
    growth = {name: by_size[name, 10_000].stage_ms / by_size[name, 1000].stage_ms for name in ("inline", "islands")}
    memory = {name: by_size[name, 10_000].memory_mb for name in ("inline", "islands")}
    claims.append(
        Claim(
            name="time and memory grow linearly, 1,000 to 10,000 stages",
            bar="time per stage at 10,000 ≤ 1.25 × at 1,000; memory ≤ 300 MB",
            value=", ".join(f"{backend} {ratio:.2f} ×" for backend, ratio in growth.items()),
            spread=", ".join(f"{backend} {mb:.0f} MB" for backend, mb in memory.items()),
            holds=max(growth.values()) <= 1.25 and max(memory.values()) <= 300,
        )
    )
    return claims


def controller_listing(runs: Sequence[EmptyRun]) -> Listing:
    """Return the table of all runs of empty stages."""
    rows = [(run.backend, f"{run.stages:,}", f"{run.stage_ms:.2f}", f"{run.memory_mb:.0f}") for run in runs]
    columns = ("backend", "stages", "ms per stage", "memory growth, MB")
    return Listing(title="Controller, empty stages", columns=columns, rows=rows)


def load_world() -> tuple[World, list[str]]:
    """Return the simulation's assumptions with the figures of `benchmarks.reliability`, and notes on them."""
    world, notes = World(nodes=1), []
    path = RESULTS / "reliability.json"
    figures = json.loads(path.read_text(encoding="utf-8")).get("figures", {}) if path.is_file() else {}
    if "restart_s" in figures:
        world = replace(world, restart_s=figures["restart_s"])
        notes.append(f"Measured (`make chaos`): {figures['restart_s']:.1f} s from resubmission to the first new step.")
    return world, notes


def simulate(world: World, seeds: int) -> tuple[list[Claim], list[Listing]]:
    """Simulate both sides for every number of nodes and every loss rate."""
    rows, results = [], []
    for nodes in (8, 32, 100, 316, 1000):
        for rate in (0.0, 0.01, 0.05, 0.2):
            setting = replace(world, nodes=nodes, preemptions_per_hour=rate)
            islands = average_runs([simulate_islands(setting, seed) for seed in range(seeds)])
            spot = average_runs([simulate_monolith(setting, seed, spot=True) for seed in range(seeds)])
            on_demand = simulate_monolith(setting, 0, spot=False)
            cells = [cell for run in (islands, spot, on_demand) for cell in _cells(run, nodes)]
            rows.append((f"{nodes:,}", f"{rate:g}", *cells))
            results.append((nodes, rate, islands, spot, on_demand))
    quantities = ("hours", "goodput", "cost")
    columns = ("islands", "losses/h", *(f"{side} {quantity}" for side in SIDES for quantity in quantities))
    worst_nodes, worst_rate, worst, *_ = min(results, key=lambda row: row[2].goodput)
    _, _, islands, spot, on_demand = next(row for row in results if row[:2] == (1000, 0.05))
    claim = Claim(
        name="simulation: 8 to 1,000 islands on spot nodes against a synchronous monolith",
        bar="reported, assumptions listed",
        value=f"goodput of the islands ≥ {worst.goodput:.3f} ({worst_nodes:,} islands, {worst_rate:g} losses/h)",
        spread=f"1,000 islands, .05 losses/h: {islands.hours:.0f} h at {islands.cost / on_demand.cost:.2f} × the cost "
        f"of the monolith on demand ({on_demand.hours:.0f} h); the monolith on spot: goodput {spot.goodput:.2f}",
        holds=True,
    )
    return [claim], [
        Listing(title=f"Simulation, {seeds} seeds, cost in on-demand node-hours per node", columns=columns, rows=rows)
    ]


SIDES = ("islands", "monolith on spot", "monolith on demand")


def _cells(run: SimulatedRun, nodes: int) -> tuple[str, str, str]:
    return f"{run.hours:.1f}", f"{run.goodput:.3f}", f"{run.cost / nodes:.1f}"


def describe_world(world: World) -> str:
    """Return the assumptions in one paragraph."""
    return (
        f"Assumptions: {world.work_h:g} h of work for each expert, and for the monolith on all nodes; a new node after "
        f"{world.provision_s:g} s; {world.restart_s:g} s from a new node to the first step; checkpoints of "
        f"{world.checkpoint_gb:g} GB; {world.node_gb_s:g} GB/s per node and {world.store_gb_s:g} GB/s in total. A spot "
        f"node costs {world.spot_price:g} of an on-demand node, a node with a fast fabric {world.fabric_price:g}. "
        "Losses are Poisson and independent. Both sides save at Young's and Daly's interval. The monolith waits for "
        "the replacement of a lost node, and its other nodes are paid during that time. Its interconnect is perfect, "
        "and it has no stragglers."
    )


def main() -> None:
    """Measure, simulate, write docs/benchmarks/scale.json and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="seeds of every simulation")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ddm-scale-") as folder:
        sizes: list[tuple[BackendName, int]] = [("inline", n) for n in SIZES]
        sizes += [("ray", n) for n in SIZES[:3]] + [("islands", n) for n in SIZES]
        runs = []
        for backend_name, count in sizes:
            runs.append(measure_empty_run(backend_name, count, Path(folder)))
            print(runs[-1], flush=True)
    world, notes = load_world()
    claims, listings = simulate(world, options.seeds)
    result = write_result(
        "scale",
        time.monotonic() - started,
        [*controller_claims(runs), *claims],
        [controller_listing(runs), *listings],
        [describe_world(world), *notes],
    )
    for claim in result["claims"]:
        print(f"{'holds' if claim.holds else 'FAILS'}  {claim.name}: {claim.value} ({claim.spread})")


if __name__ == "__main__":
    main()
