"""One controller a run: a file that names it, with a heartbeat.

A controller is *running*, *dead* or *unknown*. On this machine its process can be looked up; on another one, or in
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
"""A controller on another machine is given up after so long without a heartbeat."""

HEARTBEAT_S = 5.0


def this_process() -> dict[str, Any]:
    """Where this process is, its pid and start time: enough to recognise it later, also when the pid is used again."""
    return {**_here(), "pid": os.getpid(), "started": process_start(os.getpid())}


def is_here(process: dict[str, Any]) -> bool:
    """Whether a process that wrote itself down can be looked up by its pid: not in another container of the host."""
    return _here().items() <= process.items() and Path("/proc/self/stat").exists()


def _here() -> dict[str, str]:
    namespace = Path("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "pids": str(namespace.readlink()) if namespace.is_symlink() else ""}


def process_start(pid: int) -> str | None:
    """The start time of a process in clock ticks since boot; None if there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a run's lease."""

    process: dict[str, Any]
    """As `this_process` wrote it."""
    age_s: float
    """Seconds since its last heartbeat."""

    @property
    def is_alive(self) -> bool:
        """Whether it may still be running."""
        return is_alive(self.process, self.age_s)

    def __str__(self) -> str:
        return f"process {self.process['pid']} on {self.process['host']}"


def holder(run: RunFolder) -> Holder | None:
    """Who holds the run's lease, dead or alive; None if nobody does."""
    try:
        age_s = time.time() - run.lease.stat().st_mtime
        return Holder(read_json(run.lease), age_s)
    except (FileNotFoundError, UnfinishedArtifact):
        return None


def idle_s(attempt: Path) -> float:
    """Seconds since anything in an attempt's folder has changed."""
    return time.time() - max(path.stat().st_mtime for path in (attempt, *attempt.iterdir()))


def is_alive(process: dict[str, Any], heartbeat_s: float) -> bool:
    """Whether a process that wrote itself down `heartbeat_s` ago may still be running."""
    if is_here(process):
        return bool(process_start(int(process["pid"])) == process["started"])
    return heartbeat_s < LEASE_S


@contextlib.contextmanager
def hold_lease(run: RunFolder) -> Iterator[None]:
    """Be the run's only controller while the block lasts; raises `RunIsLocked` naming the other one."""
    _take(run)
    ended = threading.Event()
    pulse = threading.Thread(target=_heartbeat, args=(run.lease, ended), daemon=True, name="lease")
    pulse.start()
    try:
        yield
    finally:
        ended.set()
        pulse.join()
        if _is_ours(run.lease):
            run.lease.unlink()


def _take(run: RunFolder) -> None:
    """Put our name into the lease, by a link, which only one of two controllers can make."""
    own = run.root / f".controller.{os.getpid()}"
    write_json(own, this_process())
    try:
        while True:
            try:
                os.link(own, run.lease)
            except FileExistsError:
                _refuse_if_alive(run)
                run.lease.unlink(missing_ok=True)
            else:
                return
    finally:
        own.unlink()


def _refuse_if_alive(run: RunFolder) -> None:
    other = holder(run)
    if other is not None and other.is_alive:
        raise RunIsLocked(
            f"{run.root} is walked by {other} (heartbeat {other.age_s:.0f} s ago); "
            f"wait for it, or stop it with `ddm stop {run.root}`"
        )


def _is_ours(lease: Path) -> bool:
    return lease.exists() and bool(read_json(lease) == this_process())


def _heartbeat(lease: Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_S):
        if _is_ours(lease):
            lease.touch()
