"""Find every process of a local island through /proc by a mark in its environment, and end them together.

Ray's own `ray stop` ends every Ray cluster of the machine, so it is never called.
"""

import json
import os
import shutil
import signal
import stat
import sys
import tempfile
import time
from pathlib import Path

from orchestrator.errors import IslandError

MARK = "DDM_ISLAND"
"""Environment variable that all processes of an island inherit; its value is the island's folder."""

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
    """Send SIGKILL until no marked process is left, new children included; raise `IslandError` after 20 s."""
    deadline = time.monotonic() + EXIT_TIMEOUT_S
    while processes := find_marked_processes(mark):
        if time.monotonic() > deadline:
            raise IslandError(
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


FOLDER = Path("~/.ddm/islands")
"""Default folder of `ddm islands up` for tokens and storages."""

STATE = "island.json"
"""File in an island's folder with the place of its temporary files; it exists while they or processes do."""

SCRATCH_PREFIX = "ddm-"
"""Start of the name of an island's folder with temporary files."""

TOKEN = "token"  # noqa: S105 - the name of a file


def create_scratch() -> Path:
    """Create a folder for one island's temporary files that only this user can read."""
    return Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX))


def delete_scratch(folder: Path) -> None:
    """Delete a folder of `create_scratch`; one of another name, kind, owner or mode is not ours, and left alone."""
    if not folder.name.startswith(SCRATCH_PREFIX) or not folder.exists():
        return
    status = folder.lstat()
    if stat.S_ISDIR(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o700 and status.st_uid == os.getuid():
        shutil.rmtree(folder, ignore_errors=True)


def take_down(folder: Path) -> list[str]:
    """Kill every island in a folder, delete tokens and temporary files but no storage; return their names."""
    state_files = sorted(folder.glob(f"*/{STATE}"))
    for path in state_files:
        kill_marked_processes(str(path.parent))
        delete_scratch(Path(json.loads(path.read_text(encoding="utf-8"))["scratch"]))
        (path.parent / TOKEN).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    return [path.parent.name for path in state_files]


if __name__ == "__main__":
    sys.stdin.buffer.read()
    take_down(Path(sys.argv[1]))
