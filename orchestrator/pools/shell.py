"""Other people's command line tools: found before anything is done, run with a time-out, never through a shell."""

import importlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError


class PoolError(OrchestratorError):
    """A pool cannot be started or ended; the message says what is still there."""


def require_tool(tool: str, way_out: str) -> str:
    """The path of a tool, beside this Python or on the PATH; raises `PoolError` with the way out if there is none."""
    beside = Path(sys.executable).with_name(tool)
    path = str(beside) if beside.is_file() else shutil.which(tool)
    if path is None:
        raise PoolError(f"`{tool}` is not installed; {way_out}")
    return path


def require_library(name: str, way_out: str) -> Any:
    """A library that only one cloud needs; raises `PoolError` with the way out if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise PoolError(f"the library {name.partition('.')[0]} is not installed; {way_out}") from None


def tool_output(command: Sequence[str], *, timeout_s: float = 120.0, way_out: str = "") -> str:
    """What a command prints; raises `PoolError` with its last words if it fails or does not end."""
    ended = _run(command, timeout_s=timeout_s, show=False)
    if ended.returncode:
        raise PoolError(f"`{_short(command)}` failed: {_last_words(ended)}{way_out and f'; {way_out}'}")
    return ended.stdout.strip()


def run_command(command: Sequence[str], *, timeout_s: float = 3600.0) -> None:
    """Run a command on the user's screen; raises `PoolError` if it fails or does not end."""
    ended = _run(command, timeout_s=timeout_s, show=True)
    if ended.returncode:
        raise PoolError(f"`{_short(command)}` failed with exit code {ended.returncode}; its reason is above")


def _run(command: Sequence[str], *, timeout_s: float, show: bool) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            capture_output=not show,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PoolError(f"`{_short(command)}` did not end within {timeout_s:g} s") from None


def _short(command: Sequence[str]) -> str:
    return " ".join([Path(command[0]).name, *command[1:]])[:120]


def _last_words(ended: subprocess.CompletedProcess[str]) -> str:
    said = (ended.stderr.strip() or ended.stdout.strip() or f"exit code {ended.returncode}").splitlines()
    return " | ".join(line.strip() for line in said[-3:])[:500]
