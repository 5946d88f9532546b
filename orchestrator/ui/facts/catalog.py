"""The runs that a page shows: those named on the command line, and those in folders named there."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import RunFolderError
from orchestrator.run.run_folder import RunFolder

DEPTH = 3
"""Folders below a named one in which runs are looked for; a sweep keeps its trials one folder deeper than a run."""

MAX_RUNS = 500

UNSAFE = re.compile(r"[^\w-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class RunEntry:
    """A run and its name in addresses."""

    key: str
    """The folder's name, made safe, and six hex digits of its path: the same after a restart of the page."""
    run: RunFolder

    @property
    def name(self) -> str:
        """Return the folder's name."""
        return self.run.root.name


class RunCatalog:
    """Finds run folders, and again by their keys; raises `RunFolderError` if a named folder is missing."""

    def __init__(self, paths: Sequence[Path]) -> None:
        if missing := [path for path in paths if not path.is_dir()]:
            raise RunFolderError(f"{missing[0]} is not a folder; name a run folder, or a folder with run folders")
        self.paths = [path.absolute() for path in paths]
        self._known: dict[str, RunEntry] = {}

    def entries(self) -> list[RunEntry]:
        """Return every run, the most recently changed first."""
        folders = list(dict.fromkeys(folder for path in self.paths for folder in _find(path, DEPTH)))[:MAX_RUNS]
        entries = [RunEntry(_key(folder), RunFolder(folder)) for folder in folders]
        self._known = {entry.key: entry for entry in entries}
        return sorted(entries, key=lambda entry: -last_change(entry.run))

    def find(self, key: str) -> RunEntry:
        """Return the run with this key; raises `RunFolderError` if there is none."""
        if key not in self._known:
            self.entries()
        if key not in self._known:
            raise RunFolderError(f"no run has the key {key!r}; the list of runs is at /")
        return self._known[key]


def last_change(run: RunFolder) -> float:
    """Return when the journal or the configuration changed last, in seconds since the epoch; 0 if never."""
    times = [path.stat().st_mtime for path in (run.journal, run.config_file) if path.is_file()]
    return max(times, default=0.0)


def require_inside(run: RunFolder, path: Path) -> Path:
    """Return the path of a regular file of the run folder; raises `RunFolderError` if a link leads it elsewhere.

    A run folder may come from anyone, and a page may be seen by others than who serves it.
    """
    resolved = path.resolve()
    if not resolved.is_relative_to(run.root.resolve()):
        raise RunFolderError(f"{path} leads out of the run folder, so it is not shown; replace the link with the file")
    if not resolved.is_file():
        raise RunFolderError(f"{path} does not exist yet")
    return resolved


def _find(folder: Path, depth: int) -> Iterator[Path]:
    """Yield a run folder, or those below a folder; links are not followed."""
    if (folder / "config.yaml").is_file():
        yield folder
        return
    try:
        below = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    for path in below:
        if depth and not Path(path).name.startswith("."):
            yield from _find(Path(path), depth - 1)


def _key(folder: Path) -> str:
    return f"{UNSAFE.sub('-', folder.name)}-{hashlib.sha256(str(folder).encode()).hexdigest()[:6]}"
