"""External command line tools: checked before use, run with a timeout, never through a shell."""

import importlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError


class PoolError(OrchestratorError):
    """A pool cannot be started or ended; the message lists the remaining resources."""


def require_tool(tool: str, remedy: str) -> str:
    """Return the path of a tool next to this Python or on the PATH; raise `PoolError` with `remedy` if absent."""
    sibling = Path(sys.executable).with_name(tool)
    path = str(sibling) if sibling.is_file() else shutil.which(tool)
    if path is None:
        raise PoolError(f"`{tool}` is not installed; {remedy}")
    return path


def require_library(name: str, remedy: str) -> Any:
    """Import a library that only one cloud needs; raise `PoolError` with `remedy` if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise PoolError(f"the library {name.partition('.')[0]} is not installed; {remedy}") from None


def tool_output(command: Sequence[str], *, timeout_s: float = 120.0, remedy: str = "") -> str:
    """Return the output of a command; raise `PoolError` with its last lines if it fails or times out."""
    completed = _run(command, timeout_s=timeout_s, show=False)
    if completed.returncode:
        raise PoolError(f"`{_short(command)}` failed: {_tail_output(completed)}{remedy and f'; {remedy}'}")
    return completed.stdout.strip()


def run_command(command: Sequence[str], *, timeout_s: float = 3600.0) -> None:
    """Run a command with its output on the terminal; raise `PoolError` if it fails or times out."""
    completed = _run(command, timeout_s=timeout_s, show=True)
    if completed.returncode:
        raise PoolError(f"`{_short(command)}` failed with exit code {completed.returncode}; its output is above")


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


def _tail_output(completed: subprocess.CompletedProcess[str]) -> str:
    output = completed.stderr.strip() or completed.stdout.strip() or f"exit code {completed.returncode}"
    return " | ".join(line.strip() for line in output.splitlines()[-3:])[:500]
