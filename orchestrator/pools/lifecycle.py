"""Up and down: check, write, start, and afterwards look whether it is really gone."""

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
"""The configuration with which the pool was started; there while the pool is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """How nodes come and go; each function takes the configuration and the folder with the rendered files."""

    check: Callable[[PoolConfig, Path], None]
    """Raise `PoolError` if a tool or credentials are missing; changes nothing."""
    up: Callable[[PoolConfig, Path], None]
    down: Callable[[PoolConfig, Path], None]
    remaining: Callable[[PoolConfig, Path], list[str]]
    """What is still there; raises `PoolError` if that cannot be found out."""


PROVIDERS = {
    "aws": Provider(check=cloud.check_aws, up=cloud.up_aws, down=cloud.down_aws, remaining=cloud.remaining_aws),
    "gcp": Provider(check=cloud.check_gcp, up=cloud.up, down=cloud.down, remaining=cloud.remaining_gcp),
    "kuberay": Provider(check=kuberay.check, up=kuberay.up, down=kuberay.down, remaining=kuberay.remaining),
    "skypilot": Provider(check=skypilot.check, up=skypilot.up, down=skypilot.down, remaining=skypilot.remaining),
    "local": Provider(check=local.check, up=local.up, down=local.down, remaining=local.remaining),
}


def write_files(config: PoolConfig, folder: Path) -> list[Path]:
    """Write the rendered files into `folder`, each whole or not at all."""
    files = {folder / name: text for name, text in render(config).items()}
    for path, text in files.items():
        write_text(path, text)
    return list(files)


def check(config: PoolConfig, folder: Path) -> None:
    """Raise `PoolError` if the pool cannot be started, before anything costs money."""
    PROVIDERS[config.provider].check(config, folder)


def up(config: PoolConfig, folder: Path) -> None:
    """Start the pool, or bring one that is up to this configuration; what is recorded first is the way down."""
    ensure_token(config.token)
    write_files(config, folder)
    write_json(folder / CONFIG, config)
    try:
        PROVIDERS[config.provider].up(config, folder)
    except PoolError as error:
        raise PoolError(f"{error}; end what was started with `ddm pool down {config.name}`") from error


def is_started(folder: Path) -> PoolConfig:
    """The pool that was started from `folder`; raises `PoolError` if none was."""
    if not (folder / CONFIG).is_file():
        others = ", ".join(sorted(path.parent.name for path in folder.parent.glob(f"*/{CONFIG}"))) or "none"
        raise PoolError(f"no pool was started in {folder}; those that were: {others}")
    return parse_pool(read_json(folder / CONFIG))


def down(config: PoolConfig, folder: Path) -> None:
    """End the pool and look whether it is gone; raises `PoolError` naming what is left, which may still cost money."""
    provider = PROVIDERS[config.provider]
    provider.down(config, folder)
    if left := provider.remaining(config, folder):
        raise PoolError(
            f"pool {config.name} is not gone: {', '.join(left[:10])}; run `ddm pool down {config.name}` again, or end "
            "it by hand"
        )
    (folder / CONFIG).unlink()
