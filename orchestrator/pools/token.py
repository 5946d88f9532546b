"""The pool's token, which all its islands share."""

from pathlib import Path

from orchestrator.islands.token import create_token, describe_exposure
from orchestrator.pools.shell import PoolError


def ensure_token(path: Path) -> None:
    """Create the file with a new token if it is absent; raise `PoolError` if others can read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        create_token(path)
    except FileExistsError:
        if exposure := describe_exposure(path):
            raise PoolError(exposure) from None
