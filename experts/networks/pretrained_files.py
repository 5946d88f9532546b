"""A checkpoint to start from, as a folder: whether it may be read at all, and what is in it; imports no torch."""

from pathlib import Path

from ddm_core.artifacts import checksum, files_in, fingerprint
from experts.config import ExpertConfig

PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
"""Endings of files that may be pickles, which run code when they are loaded."""
NEEDED = (".json", ".safetensors")
"""Endings of the files that a network is read from; all others say nothing about it."""


class InitError(ValueError):
    """A training cannot start from this folder."""


def init_files(folder: Path) -> list[Path]:
    """The files that a network is read from; raises `InitError` for a folder without one, or with a pickle."""
    if not (folder / "config.json").is_file():
        parts = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f"; it has the parts {', '.join(parts)}: name one of them" if parts else ""
        raise InitError(f"init={folder} is no folder with a diffusers model: there is no config.json{hint}")
    found = sorted(path.name for path in folder.rglob("*") if path.suffix.lower() in PICKLES)
    if found:
        raise InitError(
            f"init={folder} holds files that may be pickles, and those are never loaded: {', '.join(found[:5])}; "
            "convert them to safetensors, or delete them"
        )
    return [path for path in files_in(folder) if path.suffix in NEEDED and path.name != "training.json"]


def init_checksum(folder: Path) -> str:
    """One checksum of all that a network is read from; raises what `init_files` does."""
    return fingerprint("init", {str(path.relative_to(folder)): checksum(path) for path in init_files(folder)}, {})


def check_unchanged(config: ExpertConfig) -> None:
    """Raise `InitError` if the folder is not what it was when the run was composed."""
    if config.init and config.init_checksum and init_checksum(Path(config.init)) != config.init_checksum:
        raise InitError(
            f"{config.init} has changed since this run was composed; bring the old files back, or start a new run"
        )
