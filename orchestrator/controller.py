"""Run a pipeline: hold the lease, run the graph on a backend, record the result."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.text import Text

from ddm_core.signals import handle_signals
from orchestrator.backends.inline import InlineBackend
from orchestrator.backends.proxies import bypass_proxies_on_loopback
from orchestrator.config.compute import ComputeConfig
from orchestrator.config.schema import RunConfig
from orchestrator.errors import OrchestratorError, RunFailed
from orchestrator.pipeline.graph import build_graph
from orchestrator.planning.checks.check import check_run
from orchestrator.reporting.budget import Budget
from orchestrator.reporting.progress import RunDisplay
from orchestrator.reporting.tracking.process import notify_of, track_run
from orchestrator.reporting.tracking.tracker import require_account
from orchestrator.run.backend import Backend
from orchestrator.run.disk_errors import disk_errors_as_messages
from orchestrator.run.lease import hold_lease
from orchestrator.run.run_folder import RunFolder
from orchestrator.run.runner import Runner, RunResult, kill_orphan_workers
from orchestrator.run.trust import require_plain_files

LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray's switch for clusters of several machines, read when Ray is imported. With "0" Ray listens on loopback only, on
every operating system."""

AUTH_MODE, AUTH_TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"

SUBMITTED_ADDRESS = "DDM_SUBMITTED_TO"
"""Environment variable with the Ray cluster's address for a controller that `ddm submit` has sent there. It is no part
of the configuration: a run folder outlives the Ray cluster on which its run started."""


def run_pipeline(config: RunConfig, console: Console) -> RunResult:
    """Run every unfinished stage under the run's lease.

    Raises `ConfigError` for a run that cannot succeed, `RunFailed` if a required stage failed permanently, and
    `BudgetReached` if it stopped because it has cost what it may.

    It prepares the run folder, opens the backend and the displays, and leaves the graph to `Runner`.
    """
    run = RunFolder(Path(config.folder).expanduser())
    require_plain_files(run)
    check_run(config, run)
    with disk_errors_as_messages(run.root), hold_lease(run) as lease:
        run.repair_journal()
        run.stop.unlink(missing_ok=True)
        run.clear_unfinished()
        graph = build_graph(config)
        require_account(config.wandb)
        run.save_config(config)
        unfinished = [stage for stage in graph if not run.is_finished(stage)]
        if not unfinished:
            console.print(
                f"All {len(graph)} stages of {run.root} are finished; nothing to do.", markup=False, soft_wrap=True
            )
            return RunResult(finished=tuple(stage.name for stage in graph), submitted=0, failed={}, stopped=False)
        budget = Budget(run, config.compute, partial(_warn, run, console))
        if config.compute.backend != "islands":  # attempts may still run on islands, and cost until they are stopped
            budget.require()
        kill_orphan_workers(run, unfinished)
        commit = project_commit()
        run.record("run_started", stages=len(graph), unfinished=len(unfinished), commit=commit)
        if config.compute.backend in ("ray", "islands"):
            address = config.compute.address or os.environ.get(SUBMITTED_ADDRESS)
            text = f"Connecting to Ray at {address} …" if address else "Starting Ray on this machine …"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
        with notify_of(run, config.notify, partial(_warn, run, console)):
            with (
                open_backend(config.compute, run) as backend,
                _stop_on_signals(run, console),
                track_run(run, config.wandb, partial(_warn, run, console)),
                RunDisplay(run, console) as display,
            ):
                runner = Runner(
                    run=run,
                    graph=graph,
                    backend=backend,
                    policy=config.compute,
                    commit=commit,
                    check_lease=lease.check,
                    before_dispatch=budget.check,
                    on_event=display.event,
                    on_tick=(display.tick,),
                )
                result = runner.run_to_end()
            run.record("run_ended", submitted=result.submitted, failed=result.failed, stopped=result.stopped)
        run.stop.unlink(missing_ok=True)
    if budget.is_reached and result.stopped:
        budget.require()
    if result.failed and not result.stopped:
        _raise_if_required(config, run, result)
    return result


def _warn(run: RunFolder, console: Console, text: str) -> None:
    """Record and print what went wrong beside the run."""
    run.record("warning", text=text)
    console.print(Text(f"Warning: {text}", style="yellow"), soft_wrap=True)


def _raise_if_required(config: RunConfig, run: RunFolder, result: RunResult) -> None:
    """Raise `RunFailed` unless only optional stages failed and the ensemble was assembled without them."""
    optional = {stage.name for stage in build_graph(config) if stage.optional}
    if set(result.failed) <= optional and "ensemble" in result.finished:
        return
    failures = "\n".join(f"  {name}: {error}" for name, error in result.failed.items())
    raise RunFailed(
        f"{len(result.failed)} stage(s) failed permanently; finished stages are kept\n{failures}\n"
        f"  logs: ddm logs {run.root} {next(iter(result.failed))}; continue with: ddm resume {run.root}"
    )


@contextlib.contextmanager
def open_backend(config: ComputeConfig, run: RunFolder) -> Iterator[Backend]:
    """Yield the backend that the configuration names, and close it when the block ends."""
    backend = BACKENDS[config.backend](config, run)
    try:
        yield backend
    finally:
        backend.close()


def _open_inline(config: ComputeConfig, run: RunFolder) -> Backend:
    return InlineBackend()


def configure_ray_security(address: str | None) -> None:
    """Set Ray's security switches in the environment, before Ray is imported: Ray reads them only then.

    An embedded cluster, and one on loopback, listens on loopback only. The embedded one gets a token that exists only
    in this environment; Ray itself would write a token file that every user of the machine can read.
    """
    bypass_proxies_on_loopback()
    switches = {}
    if address is None or address.startswith("127."):
        switches[LOOPBACK_ONLY] = "0"
    if address is None and AUTH_MODE not in os.environ:
        switches |= {AUTH_MODE: "token", AUTH_TOKEN: secrets.token_hex(32)}
    missing = {name: value for name, value in switches.items() if name not in os.environ}
    if missing and "ray" in sys.modules:
        raise OrchestratorError(
            f"{', '.join(missing)} must be set before Ray is imported; call configure_ray_security() before the import"
        )
    os.environ.update(missing)


def _open_ray(config: ComputeConfig, run: RunFolder) -> Backend:
    address = config.address or os.environ.get(SUBMITTED_ADDRESS)
    configure_ray_security(address)
    from orchestrator.backends.ray_tasks import RayBackend

    return RayBackend(replace(config, address=address), run.record)


def _open_islands(config: ComputeConfig, run: RunFolder) -> Backend:
    configure_ray_security(config.address or os.environ.get(SUBMITTED_ADDRESS))
    from orchestrator.islands.backend import IslandsBackend

    return IslandsBackend(config, run, lambda: _open_ray(config, run))


def _open_slurm(config: ComputeConfig, run: RunFolder) -> Backend:
    from orchestrator.backends.slurm import SlurmBackend

    return SlurmBackend(config, run)


BACKENDS = {"inline": _open_inline, "ray": _open_ray, "islands": _open_islands, "slurm": _open_slurm}
"""Constructors by `compute.backend`; each imports its dependencies only when it is called."""


@contextlib.contextmanager
def _stop_on_signals(run: RunFolder, console: Console) -> Iterator[None]:
    """Request a stop on the first Ctrl-C, SIGTERM or SIGHUP; a second Ctrl-C interrupts at once, without saving."""
    interrupts = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if interrupts > 1:
            raise KeyboardInterrupt
        run.request_stop()
        message = f"Stopping; continue later with `ddm resume {run.root}`. Press Ctrl-C again to stop at once."
        console.print(message, markup=False, soft_wrap=True)

    with handle_signals(stop, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield


def project_commit() -> str:
    """Return the git commit of the running checkout, or the installed version."""
    here = Path(__file__).parent
    try:
        process = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return project_version()
    return process.stdout.strip()


def project_version() -> str:
    """Return the installed version, or `uninstalled` in a bare checkout."""
    try:
        return version("decentralized-diffusion")
    except PackageNotFoundError:
        return "uninstalled"
