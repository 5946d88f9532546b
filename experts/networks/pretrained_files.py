"""Files and checksum of a checkpoint folder to start from; imports no torch."""

from pathlib import Path

from ddm_core.artifacts import checksum, fingerprint, list_files
from ddm_core.errors import DDMError
from experts.config import ExpertConfig

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
"""Suffixes of files that may be pickles, which run code when they are loaded."""
NETWORK_SUFFIXES = (".json", ".safetensors")
"""Suffixes of the files that a network is read from; all others are ignored."""


class InitError(DDMError, ValueError):
    """A training cannot start from this folder."""


def init_files(folder: Path) -> list[Path]:
    """Return the files that a network is read from; raise `InitError` for a folder without one, or with a pickle."""
    if not (folder / "config.json").is_file():
        parts = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f"; it has the parts {', '.join(parts)}: name one of them" if parts else ""
        raise InitError(f"init={folder} must be a folder with a diffusers model; it has no config.json{hint}")
    pickles = sorted(path.name for path in folder.rglob("*") if path.suffix.lower() in PICKLE_SUFFIXES)
    if pickles:
        raise InitError(
            f"init={folder} holds files that may be pickles, and those are never loaded: {', '.join(pickles[:5])}; "
            "convert them to safetensors, or delete them"
        )
    return [path for path in list_files(folder) if path.suffix in NETWORK_SUFFIXES and path.name != "training.json"]


def init_checksum(folder: Path) -> str:
    """Return one checksum of all files that a network is read from; raise `InitError` as `init_files` does."""
    return fingerprint("init", {str(path.relative_to(folder)): checksum(path) for path in init_files(folder)}, {})


def check_unchanged(config: ExpertConfig) -> None:
    """Raise `InitError` if the folder has changed since the run was composed."""
    if config.init and config.init_checksum and init_checksum(Path(config.init)) != config.init_checksum:
        raise InitError(
            f"{config.init} has changed since this run was composed; restore the old files, or start a new run"
        )
