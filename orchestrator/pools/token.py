"""The pool's token, which all its islands have in common."""

from pathlib import Path

from orchestrator.islands.token import exposure, new_token
from orchestrator.pools.shell import PoolError


def ensure_token(path: Path) -> None:
    """Make the file with a new token if it is absent; refuse one that others can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        new_token(path)
    except FileExistsError:
        if exposed := exposure(path):
            raise PoolError(exposed) from None
