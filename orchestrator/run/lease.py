"""One controller per run: a lease file that names it, with a heartbeat.

A controller is *running*, *dead* or *unknown*. On this machine its process can be looked up. On another machine, or in
another container, it counts as dead only when its heartbeat is older than the lease.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddm_core.artifacts import UnfinishedArtifact, read_json, write_json
from orchestrator.errors import RunIsLocked
from orchestrator.run.run_folder import RunFolder

LEASE_S = 30.0
"""A controller on another machine counts as dead after this time without a heartbeat."""

HEARTBEAT_S = 5.0
"""Time between two heartbeats."""


def this_process() -> dict[str, Any]:
    """Return this process's host, pid and start time, which identify it even after its pid is reused."""
    return {**_describe_host(), "pid": os.getpid(), "started": process_start_time(os.getpid())}


def is_on_this_host(process: dict[str, Any]) -> bool:
    """Return whether a recorded process can be looked up by its pid: same host, same container."""
    return _describe_host().items() <= process.items() and Path("/proc/self/stat").exists()


def _describe_host() -> dict[str, str]:
    namespace = Path("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "pids": str(namespace.readlink()) if namespace.is_symlink() else ""}


def process_start_time(pid: int) -> str | None:
    """Return the start time of a process in clock ticks since boot; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a run's lease."""

    process: dict[str, Any]
    """As returned by `this_process`."""
    age_s: float
    """Seconds since its last heartbeat."""

    @property
    def is_alive(self) -> bool:
        """Return whether it may still be running."""
        return is_alive(self.process, self.age_s)

    def __str__(self) -> str:
        return f"process {self.process['pid']} on {self.process['host']}"


def read_holder(run: RunFolder) -> Holder | None:
    """Return the process that holds the run's lease, dead or alive; None if the lease is free."""
    try:
        age_s = time.time() - run.lease.stat().st_mtime
        return Holder(read_json(run.lease), age_s)
    except (FileNotFoundError, UnfinishedArtifact):
        return None


def seconds_since_change(attempt: Path) -> float:
    """Return the seconds since the last change in an attempt's folder."""
    return time.time() - max(path.stat().st_mtime for path in (attempt, *attempt.iterdir()))


def is_alive(process: dict[str, Any], heartbeat_s: float) -> bool:
    """Return whether a process whose last heartbeat was `heartbeat_s` ago may still be running."""
    if is_on_this_host(process):
        return bool(process_start_time(int(process["pid"])) == process["started"])
    return heartbeat_s < LEASE_S


@contextlib.contextmanager
def hold_lease(run: RunFolder) -> Iterator[None]:
    """Hold the run's lease while the block lasts, and create the run folder if it is missing.

    Raises `RunIsLocked`, which names the other controller, if that may still be running.
    """
    _acquire(run)
    ended = threading.Event()
    heartbeat = threading.Thread(target=_heartbeat, args=(run.lease, ended), daemon=True, name="lease")
    heartbeat.start()
    try:
        yield
    finally:
        ended.set()
        heartbeat.join()
        if _is_ours(run.lease):
            run.lease.unlink()


def _acquire(run: RunFolder) -> None:
    """Write this process into the lease by a hard link, which only one of two controllers can create."""
    run.root.mkdir(parents=True, exist_ok=True)
    candidate = run.root / f".controller.{os.getpid()}"
    write_json(candidate, this_process())
    try:
        while True:
            try:
                os.link(candidate, run.lease)
            except FileExistsError:
                _raise_if_alive(run)
                run.lease.unlink(missing_ok=True)
            else:
                return
    finally:
        candidate.unlink()


def _raise_if_alive(run: RunFolder) -> None:
    other = read_holder(run)
    if other is not None and other.is_alive:
        raise RunIsLocked(
            f"{run.root} is run by {other} (heartbeat {other.age_s:.0f} s ago); "
            f"wait for it, or stop it with `ddm stop {run.root}`"
        )


def _is_ours(lease: Path) -> bool:
    return lease.exists() and bool(read_json(lease) == this_process())


def _heartbeat(lease: Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_S):
        if _is_ours(lease):
            lease.touch()
