"""What is wrong with an island, before it costs anything: every check is a function, every finding a row.

The checks of one island follow each other, so that one that cannot be made is left out; islands are checked in
parallel, and all of it ends within a time limit.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.config.compute import IslandConfig
from orchestrator.errors import OrchestratorError
from orchestrator.islands.preflight.local_checks import (
    check_address,
    check_clock,
    check_ray,
    check_reach,
    check_rejects_unauthenticated,
    check_resources,
    check_storage,
    check_token,
    check_token_file,
)
from orchestrator.islands.preflight.remote_checks import (
    check_job,
    check_project,
    check_python,
    check_remote_clock,
    check_remote_storage,
    check_torch,
)
from orchestrator.islands.preflight.session import PreflightSession, Verdict
from orchestrator.islands.wheel import build_wheel

State = Literal["ok", "warning", "error", "left out"]


@dataclass(frozen=True, slots=True)
class Check:
    """A check, and those that must be ok before it."""

    needs: tuple[str, ...]
    make: Callable[[PreflightSession], Verdict]


CHECKS = {
    "address": Check((), check_address),
    "token file": Check((), check_token_file),
    "reach": Check((), check_reach),
    "clock": Check(("reach",), check_clock),
    "strangers": Check(("reach",), check_rejects_unauthenticated),
    "token": Check(("reach", "token file"), check_token),
    "Ray": Check(("token",), check_ray),
    "resources": Check(("token",), check_resources),
    "storage": Check((), check_storage),
    "job": Check(("Ray", "storage"), check_job),
    "project": Check(("job",), check_project),
    "Python": Check(("job",), check_python),
    "torch": Check(("job",), check_torch),
    "storage there": Check(("job",), check_remote_storage),
    "clock there": Check(("job",), check_remote_clock),
}
"""What is looked at, in this order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One check of one island."""

    island: str
    check: str
    state: State
    text: str
    """What was found, and the way out if it is not ok."""


def check_islands(islands: Mapping[str, IslandConfig], timeout_s: float) -> list[Finding]:
    """Every check of every island, by island; one that does not come to its end in time is an error."""
    found: dict[str, list[Finding]] = {name: [] for name in islands}
    with tempfile.TemporaryDirectory(prefix="ddm-check-") as folder:
        wheel = build_wheel(Path(folder))
        threads = {
            name: threading.Thread(
                target=_check, args=(PreflightSession(name, config, wheel), found[name].append), daemon=True
            )
            for name, config in islands.items()
        }
        for thread in threads.values():
            thread.start()
        deadline = time.monotonic() + timeout_s
        for thread in threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        return [finding for name in islands for finding in _ended(name, list(found[name]), timeout_s)]


def _check(visit: PreflightSession, tell: Callable[[Finding], None]) -> None:
    """Make the checks one after the other; what needs one that was not ok is left out."""
    failed: set[str] = set()
    for name, check in CHECKS.items():
        if lacking := sorted(failed.intersection(check.needs)):
            failed.add(name)
            tell(Finding(island=visit.name, check=name, state="left out", text=f"needs {', '.join(lacking)}"))
            continue
        try:
            verdict = check.make(visit)
        except OrchestratorError as error:
            verdict = Verdict("error", str(error))
        if verdict.state == "error":
            failed.add(name)
        tell(Finding(island=visit.name, check=name, state=verdict.state, text=verdict.text))


def _ended(name: str, found: list[Finding], timeout_s: float) -> list[Finding]:
    """What was found, and an error for what was not finished."""
    missing = list(CHECKS)[len(found) :]
    text = f"not finished within {timeout_s:g} s; see what the island is busy with, or give --timeout more"
    return found + [Finding(island=name, check=check, state="error", text=text) for check in missing[:1]]
