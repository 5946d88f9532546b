"""The files of islands on this machine, and the end of all islands in a folder."""

import json
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path

from orchestrator.backends.ray_folder import short_temporary_folder
from orchestrator.run.marked_processes import kill_marked_processes

FOLDER = Path("~/.ddm/islands")
"""Default folder of `ddm islands up` for tokens and storages."""

STATE = "island.json"
"""File in an island's folder with the place of its temporary files; it exists while they or processes do."""

SCRATCH_PREFIX = "ddm-"
"""Start of the name of an island's folder with temporary files."""

TOKEN = "token"  # noqa: S105 - the name of a file


def create_scratch() -> Path:
    """Create a folder for one island's temporary files that only this user can read."""
    return Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=short_temporary_folder()))


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
