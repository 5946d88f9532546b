"""Start and end a pool: check, write files, start; end, and check that nothing remains."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ddm_core.artifacts import read_json, write_json, write_text
from orchestrator.pools.config import PoolConfig
from orchestrator.pools.load_config import parse_pool
from orchestrator.pools.providers import cloud, kuberay, local, skypilot
from orchestrator.pools.render import render
from orchestrator.pools.shell import PoolError
from orchestrator.pools.token import ensure_token

CONFIG = "pool.json"
"""File with the configuration of a started pool; it exists as long as the pool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """Functions that start and end nodes; each takes the configuration and the folder with the rendered files."""

    check: Callable[[PoolConfig, Path], None]
    """Raise `PoolError` if a tool or credentials are missing; changes nothing."""
    up: Callable[[PoolConfig, Path], None]
    down: Callable[[PoolConfig, Path], None]
    remaining: Callable[[PoolConfig, Path], list[str]]
    """Return the remaining resources; raise `PoolError` if they cannot be listed."""


PROVIDERS = {
    "aws": Provider(check=cloud.check_aws, up=cloud.up_aws, down=cloud.down_aws, remaining=cloud.remaining_aws),
    "gcp": Provider(check=cloud.check_gcp, up=cloud.up, down=cloud.down, remaining=cloud.remaining_gcp),
    "kuberay": Provider(check=kuberay.check, up=kuberay.up, down=kuberay.down, remaining=kuberay.remaining),
    "skypilot": Provider(check=skypilot.check, up=skypilot.up, down=skypilot.down, remaining=skypilot.remaining),
    "local": Provider(check=local.check, up=local.up, down=local.down, remaining=local.remaining),
}


def write_files(config: PoolConfig, folder: Path) -> list[Path]:
    """Write the rendered files into `folder`, each atomically."""
    files = {folder / name: text for name, text in render(config).items()}
    for path, text in files.items():
        write_text(path, text)
    return list(files)


def check(config: PoolConfig, folder: Path) -> None:
    """Raise `PoolError` if the pool cannot be started, before anything costs money."""
    PROVIDERS[config.provider].check(config, folder)


def up(config: PoolConfig, folder: Path) -> None:
    """Start the pool, or update one that is up; the configuration is stored first, so `down` works after a failure."""
    ensure_token(config.token_path)
    write_files(config, folder)
    write_json(folder / CONFIG, config)
    try:
        PROVIDERS[config.provider].up(config, folder)
    except PoolError as error:
        raise PoolError(f"{error}; end what was started with `ddm pool down {config.name}`") from error


def load_started_pool(folder: Path) -> PoolConfig:
    """Load the pool that was started from `folder`; raise `PoolError` if none was."""
    if not (folder / CONFIG).is_file():
        others = ", ".join(sorted(path.parent.name for path in folder.parent.glob(f"*/{CONFIG}"))) or "none"
        raise PoolError(f"no pool was started in {folder}; started pools: {others}")
    return parse_pool(read_json(folder / CONFIG))


def down(config: PoolConfig, folder: Path) -> None:
    """End the pool; raise `PoolError` with the remaining resources, which may still cost money."""
    provider = PROVIDERS[config.provider]
    provider.down(config, folder)
    if remaining := provider.remaining(config, folder):
        raise PoolError(
            f"pool {config.name} is not gone: {', '.join(remaining[:10])}; run `ddm pool down {config.name}` again, or "
            "end it by hand"
        )
    (folder / CONFIG).unlink()
