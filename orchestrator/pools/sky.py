"""SkyPilot through `sky`: one launch for each type of nodes."""

import json
from pathlib import Path
from typing import Any

from orchestrator.pools.config import PoolConfig
from orchestrator.pools.skypilot import launched, sky_name
from orchestrator.pools.tools import PoolError, answer, found, show


def check(config: PoolConfig, folder: Path) -> None:
    """`sky`, and a cloud that it may use."""
    clouds = _said([_sky(), "check", "--output=json"])
    if not any(clouds.values()):
        raise PoolError("SkyPilot may use no cloud; `sky check` says what each lacks")


def up(config: PoolConfig, folder: Path) -> None:
    """`sky launch` for each type; it comes back when the task runs."""
    for name in launched(config):
        where = ["--cluster", sky_name(config, name), str(folder / f"{name}.yaml")]
        show([_sky(), "launch", "--yes", "--detach-run", *where])


def down(config: PoolConfig, folder: Path) -> None:
    """`sky down` for each type that is still known."""
    if names := left(config, folder):
        show([_sky(), "down", "--yes", *names])


def left(config: PoolConfig, folder: Path) -> list[str]:
    """The pool's names among those that SkyPilot, after asking the clouds, still knows."""
    known = {one["name"] for one in _said([_sky(), "status", "--refresh", "--output=json"])}
    return sorted(known & {sky_name(config, name) for name in launched(config)})


def _said(command: list[str]) -> Any:
    """The JSON that a command prints, after what SkyPilot says of its own server."""
    text = answer(command)
    lines = text.splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith(("[", "{"))), 0)
    try:
        return json.loads("\n".join(lines[first:]))
    except json.JSONDecodeError:
        raise PoolError(f"SkyPilot's answer is not JSON: {text[:200]}; try `sky status`") from None


def _sky() -> str:
    return found("sky", "run `pip install skypilot[aws]` in an environment of its own and put it on the PATH")
