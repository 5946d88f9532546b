"""Every process of a local island, found through /proc by a mark in its environment, and ended together.

Ray's own `ray stop` ends every Ray cluster of the machine, so it is never called.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from orchestrator.errors import IslandError

MARK = "DDM_ISLAND"
"""Environment variable that all processes of an island inherit; its value is the island's folder."""

GONE_S = 20.0
"""A killed process may take so long to disappear: a large one on a busy machine."""


def marked_processes(mark: str) -> list[int]:
    """The processes that carry the mark, and their descendants."""
    marked = f"{MARK}={mark}".encode()
    parents = _parents()
    found = {pid for pid in parents if marked in _environment(pid)}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


def send(processes: list[int], number: signal.Signals) -> None:
    """Send a signal to processes, some of which may be gone."""
    for pid in processes:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def kill_marked(mark: str) -> None:
    """SIGKILL all of them, also those that are being born, and wait until they are gone; raises `IslandError`."""
    deadline = time.monotonic() + GONE_S
    while found := marked_processes(mark):
        if time.monotonic() > deadline:
            raise IslandError(
                f"processes {found} of {mark} have not ended {GONE_S:g} s after SIGKILL; kill them by hand"
            )
        send(found, signal.SIGKILL)
        time.sleep(0.05)


def _parents() -> dict[int, int]:
    """The parent of every process that is not a zombie."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] not in "ZX":
            found[int(entry.name)] = int(fields[1])
    return found


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


FOLDER = Path("~/.ddm/islands")
"""Where `ddm islands up` keeps tokens and storages unless told otherwise."""

STATE = "island.json"
"""In an island's folder while it has processes or temporary files: where they are."""

TOKEN = "token"  # noqa: S105 - the name of a file


def take_down(folder: Path) -> list[str]:
    """Kill every island in a folder, delete its token and its temporary files, and name it; its storage stays."""
    found = sorted(folder.glob(f"*/{STATE}"))
    for state in found:
        kill_marked(str(state.parent))
        shutil.rmtree(json.loads(state.read_text(encoding="utf-8"))["scratch"], ignore_errors=True)
        (state.parent / TOKEN).unlink(missing_ok=True)
        state.unlink(missing_ok=True)
    return [state.parent.name for state in found]


if __name__ == "__main__":
    sys.stdin.buffer.read()
    take_down(Path(sys.argv[1]))
