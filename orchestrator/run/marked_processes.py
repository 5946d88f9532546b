"""Find every process that carries a mark in its environment, through /proc, and end them together.

Ray's own `ray stop` ends every Ray cluster of the machine, so it is never called.
"""

import os
import signal
import time
from pathlib import Path

from orchestrator.errors import OrchestratorError

MARK = "DDM_ISLAND"
"""Environment variable that all processes of a Ray cluster of ours inherit; its value is the cluster's own folder."""

KEEP_ENVIRONMENT = {"SPT_NOENV": "1"}
"""A process that renames itself, as Ray's do, then keeps its environment, and so the mark."""

EXIT_TIMEOUT_S = 20.0
"""Longest wait for a killed process to disappear: a large one on a busy machine is slow."""


def find_marked_processes(mark: str) -> list[int]:
    """Return the process ids that carry the mark, and their descendants."""
    variable = f"{MARK}={mark}".encode()
    parents = _read_parents()
    processes = {pid for pid in parents if variable in _read_environment(pid)}
    while children := {pid for pid, parent in parents.items() if parent in processes} - processes:
        processes |= children
    return sorted(processes)


def send_signal(processes: list[int], number: signal.Signals) -> None:
    """Send a signal to processes, some of which may be gone."""
    for pid in processes:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def kill_marked_processes(mark: str) -> None:
    """Send SIGKILL until no marked process is left, new children included; raise `OrchestratorError` after 20 s."""
    deadline = time.monotonic() + EXIT_TIMEOUT_S
    while processes := find_marked_processes(mark):
        if time.monotonic() > deadline:
            raise OrchestratorError(
                f"processes {processes} of {mark} have not ended {EXIT_TIMEOUT_S:g} s after SIGKILL; kill them by hand"
            )
        send_signal(processes, signal.SIGKILL)
        time.sleep(0.05)


def _read_parents() -> dict[int, int]:
    """Return the parent of every process that is not a zombie."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] not in "ZX":
            parents[int(entry.name)] = int(fields[1])
    return parents


def _read_environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
