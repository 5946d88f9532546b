"""Commands of `ddm` in forked children of a process that has imported everything: milliseconds instead of seconds each.

The parent must run no command and no tensor operation itself: a fork copies locked thread pools as they are.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.cli import app
from orchestrator.reporting import progress

TIMEOUT_S = 20.0
"""A command of a tiny run that takes longer hangs."""

UNKILLED_S = 3600.0
"""Time after which a child that is not to be killed hangs."""

WIDTH = 400
"""Columns of the terminal: no line is folded at a place that depends on a time."""

HUNG = -99
"""Exit code of a command that was killed after its timeout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a command left behind."""

    code: int
    """Its exit code, the negative number of the signal that ended it, or `HUNG`."""
    output: str
    """Standard output and standard error together."""

    @property
    def is_crash(self) -> bool:
        """Return whether it ended with a traceback, a signal or a timeout instead of a message."""
        return self.code < 0 or "Traceback (most recent call last)" in self.output


def run_command(arguments: Sequence[str], output: Path, *, timeout_s: float = TIMEOUT_S) -> Result:
    """Run `ddm` with these arguments in a forked child and return its result; `output` is a file for its text."""

    def command() -> None:
        sys.argv = ["ddm", *arguments]
        app.console.width = WIDTH
        progress.LOOK_EVERY_S = TIMEOUT_S**2  # lines of progress depend on the speed of the machine
        app.main()

    return run_forked(command, output, timeout_s=timeout_s)


def run_forked(
    function: Callable[[], object], output: Path, *, timeout_s: float, until: Callable[[], bool] = bool
) -> Result:
    """Call a function in a forked child with a process group of its own; kill the group at the timeout or `until`."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _run_in_child(function, output)
    deadline, code = time.monotonic() + timeout_s, None
    while code is None:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > deadline or until():
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            code = HUNG
        else:
            time.sleep(0.002)
    return Result(code=code, output=output.read_text(encoding="utf-8", errors="replace"))


def run_killed(function: Callable[[], object], output: Path, kill_after_s: float | None) -> None:
    """Call a function in a forked child that is killed after some seconds; None lets it end.

    Raises `RuntimeError` if one that may end fails.
    """
    result = run_forked(function, output, timeout_s=UNKILLED_S if kill_after_s is None else kill_after_s)
    if kill_after_s is None and result.code:
        raise RuntimeError(f"the process of {output} ended with code {result.code}: {result.output}")


def _run_in_child(function: Callable[[], object], output: Path) -> None:
    """Call the function with both standard streams in a file, and end this process as Python would."""
    os.setpgid(0, 0)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 0
    try:
        function()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else bool(error.code)
    except BaseException:  # noqa: BLE001 - what Python's own top level does
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def import_what_commands_import(commands: Sequence[Sequence[str]], output: Path) -> list[Result]:
    """Run each command once, import in this process what it has imported, and return the results."""
    modules = output.with_suffix(".modules")
    results = []
    for arguments in commands:

        def command(arguments: Sequence[str] = arguments) -> None:
            before = set(sys.modules)
            sys.argv = ["ddm", *arguments]
            app.console.width = WIDTH
            try:
                app.main()
            finally:
                modules.write_text("\n".join(name for name in sys.modules if name not in before))

        results.append(run_forked(command, output, timeout_s=600))
        for name in modules.read_text().splitlines():
            if name.partition(".")[0] not in sys.modules or name not in sys.modules:
                try:
                    __import__(name)
                except ImportError:
                    continue  # a module that a library has made up
    return results
