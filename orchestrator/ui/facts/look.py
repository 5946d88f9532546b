"""The sizes and times of a run's files at one time: whether anything has changed, without reading a file."""

from dataclasses import dataclass
from pathlib import Path

from orchestrator.run.lease import read_holder
from orchestrator.run.run_folder import RunFolder

LIVE_FILES = ("metrics.jsonl", "log.txt")
"""Files of an attempt that grow; all others are replaced."""

Stamp = tuple[int, int]
"""Size and time of change (ns) of a file."""


@dataclass(frozen=True, slots=True)
class Look:
    """The stamps of a run's files at one time."""

    holder: str
    """The controller, and whether it is alive: a killed one changes no file."""
    status: dict[str, Stamp]
    """Files from which the status of the stages is read."""
    growing: dict[str, dict[str, Stamp]]
    """By name in `LIVE_FILES`, those of every stage's latest attempt, by its folder relative to the run's."""


def look(run: RunFolder) -> Look:
    """Return the stamps of a run's files; those that are missing, also a whole run folder, have none."""
    status: dict[str, Stamp] = {}
    growing: dict[str, dict[str, Stamp]] = {name: {} for name in LIVE_FILES}
    paths = [run.config_file, run.journal, run.islands]
    for attempts in run.attempted_stages():
        paths += [attempts[-1] / name for name in ("worker.json", "progress.json", "outcome.json")]
        paths.append(run.artifact_of_attempt(attempts[-1]) / "manifest.json")
        for name in LIVE_FILES:
            if stamp := _stamp(attempts[-1] / name):
                growing[name][str(attempts[-1].relative_to(run.root))] = stamp
    for path in paths:
        if stamp := _stamp(path):
            status[str(path)] = stamp
    holder = read_holder(run)
    return Look(holder=f"{holder} {holder.is_alive}" if holder else "", status=status, growing=growing)


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
