"""Files and checksum of a checkpoint folder to start from; imports no torch."""

from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddm_core.artifacts import MANIFEST, ArtifactError, fingerprint, read_json
from ddm_core.errors import DDMError
from ddm_core.files.checksums import checksum
from experts.config import ExpertConfig
from experts.networks.adapters.adapter import DataShape
from experts.networks.adapters.registry import ADAPTERS
from experts.networks.class_settings import default_settings

WEIGHTS = "diffusion_pytorch_model.safetensors"
WEIGHTS_INDEX = f"{WEIGHTS}.index.json"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
"""Suffixes of files that may be pickles, which run code when they are loaded."""


class InitError(DDMError, ValueError):
    """A training cannot start from this folder."""


def weight_files(folder: Path) -> list[Path]:
    """Return the files that diffusers reads the weights from: those in the index, else the whole file.

    Variants (`*.fp16.safetensors`), other steps and pickles beside them are not read, nor is an index that leads to
    them or out of the folder. Raises `FileNotFoundError` if a file is missing.
    """
    names = _indexed_files(folder) or [WEIGHTS]
    if missing := [name for name in names if not (folder / name).is_file()]:
        others = sorted(path.name for path in folder.glob("*") if path.suffix in (*PICKLE_SUFFIXES, ".safetensors"))
        advice = (
            f"; it has {', '.join(others[:5])}: rename a variant, and convert a pickle to safetensors" if others else ""
        )
        raise FileNotFoundError(f"there is no file {missing[0]}, and pickles are not read{advice}")
    return [folder / name for name in names]


def _indexed_files(folder: Path) -> list[str]:
    """Return the names in the index of a model in several files; empty if one is no safetensors file beside it."""
    index = read_json(folder / WEIGHTS_INDEX) if (folder / WEIGHTS_INDEX).is_file() else None
    names = index.get("weight_map") if isinstance(index, dict) else None
    files = list(names.values()) if isinstance(names, dict) else []
    return sorted(set(files)) if all(map(_is_weights_name, files)) else []


def _is_weights_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def init_files(folder: Path, key: str = "init") -> list[Path]:
    """Return the files that a model is read from; raise `InitError` for a folder without one, or with a pickle only.

    `key` names the folder in messages.

    A snapshot in the Hub's cache consists of links into its `blobs`, which are followed; no other link is.
    """
    if not (folder / "config.json").is_file():
        parts = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f"; it has the parts {', '.join(parts)}: name one of them" if parts else ""
        raise InitError(f"{key}={folder} must be a folder with a diffusers model; it has no config.json{hint}")
    try:
        weights = weight_files(folder)
    except (ArtifactError, FileNotFoundError, ValueError) as error:
        raise InitError(f"{key}={folder}: {error}") from error
    settings = [path for path in folder.glob("*.json") if path.name not in (MANIFEST, "training.json")]
    snapshots = (parent for parent in folder.resolve().parents if parent.name == "snapshots")
    blobs = next((parent.parent / "blobs" for parent in snapshots), None)
    for path in (files := sorted([*settings, *weights])):
        if path.is_symlink() and path.resolve().parent != blobs:
            raise InitError(f"{key}={path} is a link, which may point anywhere; replace it with the file it points to")
    return files


def init_checksum(folder: Path, key: str = "init") -> str:
    """Return one checksum of all files that a network is read from; raise `InitError` as `init_files` does."""
    return fingerprint("init", {str(path.relative_to(folder)): checksum(path) for path in init_files(folder, key)}, {})


def check_unchanged(config: ExpertConfig) -> None:
    """Raise `InitError` if the folder has changed since the run was composed."""
    if config.init and config.init_checksum and init_checksum(Path(config.init)) != config.init_checksum:
        raise InitError(
            f"{config.init} has changed since this run was composed; restore the old files, or start a new run"
        )


def check_init_settings(folder: Path, data: DataShape) -> None:
    """Raise `InitError` if the `config.json` of a checkpoint alone shows that it does not fit the data.

    Classes are left to the training: their number may not be known yet.
    """
    init_files(folder)
    config = read_json(folder / "config.json")
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name not in ADAPTERS:
        raise InitError(f"init={folder} holds a network of class {name!r}; known are {', '.join(ADAPTERS)}")
    settings = {**default_settings(ADAPTERS[name]), **config}
    if settings.get("out_channels") == 2 * (settings.get("in_channels") or 0):  # a learned variance is left out
        settings["out_channels"] = settings["in_channels"]
    ones, twos = (ADAPTERS[name].data_settings(settings, replace(data, num_classes=count)) for count in (1, 2))
    check_fits(name, settings, folder, data, ignored={key for key in ones if ones[key] != twos[key]})


ANY_SIDE = "sample_size"
"""The setting that networks with text ignore: they take latents of any side."""


def check_fits(
    class_name: str, settings: Mapping[str, Any], folder: Path, data: DataShape, ignored: Set[str] = frozenset()
) -> None:
    """Raise `InitError` unless the settings of a checkpoint that follow from the data are those of these data."""
    adapter = ADAPTERS[class_name]
    expected = adapter.data_settings(settings, data) if adapter.is_flat or len(data.latent_shape) == 3 else {}
    left_out = ignored | ({ANY_SIDE} if adapter.reads_text else set())
    checked = {name: value for name, value in expected.items() if name not in left_out}
    unlike = {name: value for name, value in checked.items() if not _is_equal(name, settings[name], value)}
    if unlike or not checked:
        theirs = ", ".join(f"{name}={settings[name]}" for name in unlike) or "latents of images"
        ours = ", ".join(f"{name}={value}" for name, value in unlike.items()) or f"latents of shape {data.latent_shape}"
        raise InitError(
            f"init={folder} has {theirs}, and the data need {ours}; choose another codec, data.image_size, "
            "text encoder or data.labels, or another checkpoint"
        )


def _is_equal(name: str, setting: Any, expected: Any) -> bool:
    """Return whether a checkpoint's setting is the expected one.

    Without `out_channels` it returns as many as it takes; no class embedding is as good as one of the null class alone.
    """
    if setting is None:
        return name == "out_channels" or expected in (None, 1)
    return bool((tuple(setting) if isinstance(expected, tuple) else setting) == expected)
