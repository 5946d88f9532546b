"""Published autoencoders: their folders, here or on the Hub, and the shape of their latents; imports no torch."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ddm_core.artifacts import ArtifactError, read_json
from ddm_core.hub_files import HubError, download_snapshot
from experts.config import CodecConfig
from experts.errors import CodecError
from experts.networks.pretrained_files import WEIGHTS, WEIGHTS_INDEX, InitError, init_checksum

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)+")
"""`owner/name`, or `owner/name/folder` for a part of a pipeline."""

FILES = ("config.json", WEIGHTS, WEIGHTS_INDEX, WEIGHTS.replace(".", "-*."))
"""What is downloaded: no pickle, no code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentGrid:
    """The images that an autoencoder takes, and the grid of its latents."""

    image_channels: int
    channels: int
    factor: int
    """Pixels a side of one position of the grid."""
    image_size: int | None = None
    """The only side that images may have; None: every multiple of `factor`."""

    def shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return channels, height and width of the latents; raise `CodecError` for images that do not fit.

        Gray images fit three channels: they are repeated, and the decoded channels averaged.
        """
        height, width, channels = image_shape
        if channels not in (1, self.image_channels):
            can_convert = self.image_channels in (1, 3)
            remedy = f"set data.channels={self.image_channels}, or " if can_convert else "images have 1 or 3, so "
            raise CodecError(
                f"the autoencoder takes images of {self.image_channels} channels, not {channels}; {remedy}choose "
                "another codec"
            )
        if height % self.factor or width % self.factor or self.image_size not in (None, height):
            sides = f"a multiple of {self.factor}" if self.image_size is None else str(self.image_size)
            raise CodecError(
                f"the autoencoder takes images whose sides are {sides}, not {height}x{width}; change data.image_size"
            )
        return self.channels, height // self.factor, width // self.factor


def read_grid(settings: Mapping[str, Any]) -> LatentGrid:
    """Return the grid of an autoencoder from its `config.json`; raise `CodecError` for another class, or no numbers."""
    name = settings.get("_class_name")
    if name not in AUTOENCODERS:
        raise CodecError(f"an autoencoder must be of class {', '.join(AUTOENCODERS)}; got {name!r}; choose another one")
    try:
        return AUTOENCODERS[name](settings)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CodecError(f"the config.json of an {name} is not valid ({error!r}); download it again") from error


def _read_convolutional(settings: Mapping[str, Any], *, widths: str, packing: int = 1) -> LatentGrid:
    """Every width after the first halves the sides; `packing` is the side of the squares that become channels."""
    return LatentGrid(
        image_channels=int(settings["in_channels"]),
        channels=int(settings["latent_channels"]) * packing**2,
        factor=packing * 2 ** (len(settings[widths]) - 1),
    )


def _read_representation(settings: Mapping[str, Any]) -> LatentGrid:
    side = settings["encoder_input_size"] // settings["encoder_patch_size"]
    return LatentGrid(
        image_channels=int(settings["num_channels"]),
        channels=int(settings["encoder_hidden_size"]),
        factor=int(settings["patch_size"]),
        image_size=int(settings["patch_size"] * side),
    )


AUTOENCODERS: dict[str, Callable[[Mapping[str, Any]], LatentGrid]] = {
    "AutoencoderKL": partial(_read_convolutional, widths="block_out_channels"),
    "AutoencoderTiny": partial(_read_convolutional, widths="encoder_block_out_channels"),
    "AutoencoderDC": partial(_read_convolutional, widths="encoder_block_out_channels"),
    "AutoencoderKLFlux2": partial(_read_convolutional, widths="block_out_channels", packing=2),
    "AutoencoderRAE": _read_representation,
}
"""Maps each class of diffusers to the function that reads its grid."""


def published_grid(config: CodecConfig) -> LatentGrid:
    """Return the grid of the autoencoder at `codec.path`; raise `CodecError`."""
    try:
        settings = read_json(find_folder(config, ["config.json"]) / "config.json")
    except ArtifactError as error:
        raise CodecError(f"codec.path={config.path} must hold a diffusers autoencoder: {error}") from error
    return read_grid(settings if isinstance(settings, dict) else {})


def path_checksum(path: str) -> str:
    """Return what identifies the files at `codec.path`: a checksum, or the commit of a repository on the Hub."""
    if not Path(path).is_dir():
        return _download(path, "", ["config.json"]).name
    try:
        return init_checksum(Path(path), "codec.path")
    except InitError as error:
        raise CodecError(str(error)) from error


def find_folder(config: CodecConfig, files: Sequence[str] = FILES) -> Path:
    """Return the folder at `codec.path` with these files, those of the recorded commit if they are on the Hub.

    Raises `CodecError` if it cannot be had, or has changed since its checksum was recorded.
    """
    path = str(config.path)
    if not Path(path).is_dir():
        return _download(path, config.path_checksum, files).joinpath(*path.split("/")[2:])
    if config.path_checksum and config.path_checksum != path_checksum(path):
        raise CodecError(f"{path} has changed since this run was composed; restore the old files, or start a new run")
    return Path(path)


def _download(path: str, commit: str, files: Sequence[str]) -> Path:
    """Return the snapshot of a repository on the Hub, which is named by its commit; raise `CodecError` without it."""
    if not HUB_ID.fullmatch(path):
        raise CodecError(
            f"codec.path={path} must be a folder with a diffusers autoencoder, or its name on the Hub, such as "
            "owner/name or owner/name/vae"
        )
    owner, name, *parts = path.split("/")
    patterns = ["/".join([*parts, file]) for file in files]
    try:
        return download_snapshot(f"{owner}/{name}", patterns, revision=commit or None)
    except HubError as error:
        raise CodecError(
            f"codec.path={path} is no folder here, and the Hub does not give it ({error}); check the name and the "
            "network, or download it and name its folder"
        ) from error
