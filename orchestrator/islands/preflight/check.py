"""Find what is wrong with an island before it costs anything: every check is a function, every finding a row.

The checks of one island run in sequence, and a check is left out if one that it needs has failed. Islands are checked
in parallel, within one time limit.
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
    """A check, and the names of the checks that must not fail before it."""

    needs: tuple[str, ...]
    run: Callable[[PreflightSession], Verdict]


CHECKS = {
    "address": Check((), check_address),
    "token file": Check((), check_token_file),
    "reach": Check((), check_reach),
    "clock": Check(("reach",), check_clock),
    "authentication": Check(("reach",), check_rejects_unauthenticated),
    "token": Check(("reach", "token file"), check_token),
    "Ray": Check(("token",), check_ray),
    "resources": Check(("token",), check_resources),
    "storage": Check((), check_storage),
    "job": Check(("Ray", "storage"), check_job),
    "project": Check(("job",), check_project),
    "Python": Check(("job",), check_python),
    "torch": Check(("job",), check_torch),
    "remote storage": Check(("job",), check_remote_storage),
    "remote clock": Check(("job",), check_remote_clock),
}
"""All checks by name, in the order in which they run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Result of one check of one island."""

    island: str
    check: str
    state: State
    text: str
    """The result, with the remedy if it is not ok."""


def check_islands(islands: Mapping[str, IslandConfig], timeout_s: float) -> list[Finding]:
    """Run every check of every island; a check that does not finish within `timeout_s` is an error."""
    findings: dict[str, list[Finding]] = {name: [] for name in islands}
    with tempfile.TemporaryDirectory(prefix="ddm-check-") as folder:
        wheel = build_wheel(Path(folder))
        threads = {
            name: threading.Thread(
                target=_run_checks, args=(PreflightSession(name, config, wheel), findings[name].append), daemon=True
            )
            for name, config in islands.items()
        }
        for thread in threads.values():
            thread.start()
        deadline = time.monotonic() + timeout_s
        for thread in threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))
        return [each for name in islands for each in _add_unfinished(name, list(findings[name]), timeout_s)]


def _run_checks(session: PreflightSession, report: Callable[[Finding], None]) -> None:
    """Run the checks in sequence; leave out those that need a failed one."""
    failed: set[str] = set()
    for name, check in CHECKS.items():
        if lacking := sorted(failed.intersection(check.needs)):
            failed.add(name)
            report(Finding(island=session.name, check=name, state="left out", text=f"needs {', '.join(lacking)}"))
            continue
        try:
            verdict = check.run(session)
        except OrchestratorError as error:
            verdict = Verdict("error", str(error))
        if verdict.state == "error":
            failed.add(name)
        report(Finding(island=session.name, check=name, state=verdict.state, text=verdict.text))


def _add_unfinished(name: str, findings: list[Finding], timeout_s: float) -> list[Finding]:
    """Return the findings, with an error for the first check that has not finished."""
    unfinished = list(CHECKS)[len(findings) :]
    text = f"not finished within {timeout_s:g} s; see what the island is busy with, or give --timeout more"
    return findings + [Finding(island=name, check=check, state="error", text=text) for check in unfinished[:1]]
