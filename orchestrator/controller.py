"""One run from its configuration to its report: hold the lease, walk the graph, say what happened."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType

from rich.console import Console

from ddm_core.signals import handle_signals
from orchestrator.backends.inline import InlineBackend
from orchestrator.config.compute import ComputeConfig
from orchestrator.config.schema import RunConfig
from orchestrator.errors import OrchestratorError, RunFailed
from orchestrator.pipeline.graph import build_graph
from orchestrator.reporting.progress import RunDisplay
from orchestrator.reporting.wandb_tracker import WandbTracker
from orchestrator.run.backend import Backend
from orchestrator.run.disk_errors import disk_errors_as_messages
from orchestrator.run.lease import hold_lease
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.runner import Runner, RunResult, kill_orphan_workers

LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's switch for clusters of several machines, which it reads when it is imported: with "0" it listens on loopback
alone, whatever the system's name."""

AUTH_MODE, AUTH_TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"

SUBMITTED_TO = "DDM_SUBMITTED_TO"
"""Environment variable of a controller that `ddm submit` has sent: the Ray cluster that it is on, for its stages. It is
no part of the configuration, since a run folder outlives the Ray cluster on which it was begun."""


def run_pipeline(config: RunConfig, console: Console) -> RunResult:
    """Bring the run to its end, or as far as it comes; raises `RunFailed` if a stage that is needed failed."""
    run = RunFolder(Path(config.folder).expanduser())
    with disk_errors_as_messages(run.root):
        run.root.mkdir(parents=True, exist_ok=True)
        result = _run_under_lease(config, run, console)
    if result.failed and not result.stopped:
        _raise_if_needed(config, run, result)
    return result


def _run_under_lease(config: RunConfig, run: RunFolder, console: Console) -> RunResult:
    with hold_lease(run):
        run.repair_journal()
        run.stop.unlink(missing_ok=True)
        run.clear_unfinished()
        run.save_config(config)
        return _run_graph(config, run, console)


def _run_graph(config: RunConfig, run: RunFolder, console: Console) -> RunResult:
    graph = build_graph(config)
    unfinished = [stage for stage in graph if not run.finished(stage)]
    if not unfinished:
        console.print(f"All {len(graph)} stages of {run.root} are finished; nothing to do.")
        return RunResult(finished=tuple(stage.name for stage in graph), submitted=0, failed={}, stopped=False)
    kill_orphan_workers(run, unfinished)
    commit = project_commit()
    run.record("run_started", stages=len(graph), unfinished=len(unfinished), commit=commit)
    tracker = WandbTracker(run, config.wandb, config.name)
    with (
        _backend(config.compute, run) as backend,
        _stop_on_signals(run, console),
        RunDisplay(run, console) as display,
    ):
        runner = Runner(
            run=run,
            graph=graph,
            backend=backend,
            policy=config.compute,
            commit=commit,
            on_event=display.event,
            on_tick=(display.tick, tracker.follow),
        )
        result = runner.run_to_end()
        tracker.close(runner.graph)
    run.record("run_ended", submitted=result.submitted, failed=result.failed, stopped=result.stopped)
    run.stop.unlink(missing_ok=True)
    return result


def _raise_if_needed(config: RunConfig, run: RunFolder, result: RunResult) -> None:
    """An expert that failed for good is reported, not raised, as long as the ensemble stands without it."""
    optional = {stage.name for stage in build_graph(config) if stage.optional}
    if set(result.failed) <= optional and "ensemble" in result.finished:
        return
    failures = "\n".join(f"  {name}: {error}" for name, error in result.failed.items())
    raise RunFailed(
        f"{len(result.failed)} stage(s) failed for good; what had finished is kept\n{failures}\n"
        f"  logs: ddm logs {run.root} {next(iter(result.failed))}; go on with: ddm resume {run.root}"
    )


@contextlib.contextmanager
def _backend(config: ComputeConfig, run: RunFolder) -> Iterator[Backend]:
    """The backend that the configuration names."""
    backend = BACKENDS[config.backend](config, run)
    try:
        yield backend
    finally:
        backend.close()


def _inline(config: ComputeConfig, run: RunFolder) -> Backend:
    return InlineBackend()


def shield(address: str | None) -> None:
    """Set Ray's switches before it is imported: it reads them once, then and never again.

    A cluster of this process's own, and one on loopback, is heard on loopback alone; the own one has a token that only
    this environment knows, where Ray would write one that every user of the machine can read.
    """
    wanted = {}
    if address is None or address.startswith("127."):
        wanted[LOOPBACK_ONLY] = "0"
    if address is None and AUTH_MODE not in os.environ:
        wanted |= {AUTH_MODE: "token", AUTH_TOKEN: secrets.token_hex(32)}
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    if missing and "ray" in sys.modules:
        raise OrchestratorError(f"Ray was imported before {', '.join(missing)} could be set; import it after shield()")
    os.environ.update(missing)


def _ray(config: ComputeConfig, run: RunFolder) -> Backend:
    address = config.address or os.environ.get(SUBMITTED_TO)
    shield(address)
    from orchestrator.backends.ray_tasks import RayBackend

    return RayBackend(replace(config, address=address))


def _islands(config: ComputeConfig, run: RunFolder) -> Backend:
    shield(config.address or os.environ.get(SUBMITTED_TO))
    from orchestrator.islands.backend import IslandsBackend

    return IslandsBackend(config, run, lambda: _ray(config, run))


def _slurm(config: ComputeConfig, run: RunFolder) -> Backend:
    from orchestrator.backends.slurm import SlurmBackend

    return SlurmBackend(config, run)


BACKENDS = {"inline": _inline, "ray": _ray, "islands": _islands, "slurm": _slurm}
"""What `compute.backend` may be; each imports what it needs only when it is wanted."""


@contextlib.contextmanager
def _stop_on_signals(run: RunFolder, console: Console) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks every stage to save its work; a second Ctrl-C does not wait for that."""

    def stop(number: int, frame: FrameType | None) -> None:
        if run.stop.exists():
            raise KeyboardInterrupt
        run.stop.touch()
        said = f"Stopping; go on later with `ddm resume {run.root}`. Press Ctrl-C again to stop at once."
        console.print(said, soft_wrap=True)

    with handle_signals(stop, signal.SIGINT, signal.SIGTERM):
        yield


def project_commit() -> str:
    """The git commit of the checkout that runs, or the installed version."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return project_version()
    return found.stdout.strip()


def project_version() -> str:
    """The installed version, or `uninstalled` in a bare checkout."""
    try:
        return version("decentralized-diffusion")
    except PackageNotFoundError:
        return "uninstalled"
