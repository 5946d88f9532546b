"""Which data each network accepts: rules on the configuration alone, without torch."""

import difflib
import math
from collections.abc import Iterable

from experts.config import CodecConfig, UNetConfig
from experts.errors import CodecError
from experts.networks.adapters.adapter import Adapter, DataShape, Settings
from experts.networks.adapters.registry import ADAPTERS
from experts.networks.autoencoder_files import LatentGrid, published_grid
from experts.networks.class_settings import (
    AnyNetworkConfig,
    ClassSettings,
    NetworkError,
    SettingsError,
    class_settings,
    default_settings,
)

IMAGE_COMPONENTS = ("pca", "pca_conv")
"""Codecs that take `codec.components` principal components of whole images."""


def latent_shape_of(config: CodecConfig, image_size: int, channels: int) -> tuple[int, ...]:
    """Return the shape of a sample in the codec's latent space; raise `CodecError` if the codec does not fit images."""
    if config.kind == "pixels":
        return (channels, image_size, image_size)
    if config.kind in IMAGE_COMPONENTS:
        return (config.components,)
    if (config.kind == "autoencoder") != (config.path is not None):
        raise CodecError(
            f"codec.path names the files of codec.kind=autoencoder and of no other; got codec.kind={config.kind}, "
            f"codec.path={config.path}; set both or none"
        )
    if config.path is not None:
        return published_grid(config).shape((image_size, image_size, channels))
    if config.kind.startswith("patch_pca"):
        return _patch_grid(config, image_size, channels)
    if config.patch_size & (config.patch_size - 1):
        raise CodecError(
            f"{config.kind} halves the sides, so codec.patch_size must be a power of two, not {config.patch_size}"
        )
    grid = LatentGrid(image_channels=channels, channels=config.latent_channels, factor=config.patch_size)
    return grid.shape((image_size, image_size, channels))


def _patch_grid(config: CodecConfig, image_size: int, channels: int) -> tuple[int, ...]:
    if image_size % config.patch_size:
        raise CodecError(
            f"codec.patch_size={config.patch_size} must divide the side of the images, {image_size}; "
            f"set it to {math.gcd(image_size, config.patch_size)}, or change data.image_size"
        )
    if config.latent_channels > (values := count_pca_values(config, image_size, channels)):
        raise CodecError(
            f"a patch of {config.patch_size}x{config.patch_size}x{channels} values has {values} principal components, "
            f"not codec.latent_channels={config.latent_channels}; lower it"
        )
    return (config.latent_channels, image_size // config.patch_size, image_size // config.patch_size)


def count_pca_values(config: CodecConfig, image_size: int, channels: int) -> int:
    """Return the number of values that the codec takes principal components of; 0 for a codec without."""
    if config.kind in IMAGE_COMPONENTS:
        return image_size**2 * channels
    return config.patch_size**2 * channels if config.kind.startswith("patch_pca") else 0


def check_latent_shape(config: AnyNetworkConfig, latent_shape: tuple[int, ...], *, many_shapes: bool = False) -> None:
    """Raise `NetworkError` if a network cannot have such latents, or its class no such settings.

    With `many_shapes` it must also take latents of other shapes.
    """
    network = class_settings(config)
    complete = complete_settings(network)
    if many_shapes and (network.adapter.is_flat or network.adapter.is_square):
        raise NetworkError(
            f"{network_name(config)} takes latents of one shape; choose expert=unet or a transformer of another class, "
            "such as expert=pixart_small, or leave data.aspect_buckets out"
        )
    if network.adapter.is_flat:
        return
    is_image = len(latent_shape) == 3 and (latent_shape[1] == latent_shape[2] or not network.adapter.is_square)
    if not is_image:
        shape = "(channels, side, side)" if network.adapter.is_square else "(channels, height, width)"
        raise NetworkError(
            f"{network_name(config)} needs latents of shape {shape}, not {latent_shape}; "
            "choose network residual_mlp, or codec pixels or patch_pca"
        )
    _check_sides(config, _side_multiple(network, complete), latent_shape[1:])


def check_condition(config: AnyNetworkConfig, num_classes: int, text_shape: tuple[int, int, int] | None) -> None:
    """Raise `NetworkError` if a network cannot read the classes, or the text, or lacks a text that it needs.

    `text_shape` is (tokens, features of a token, features of the pooled vector); None is no text.
    """
    network, name = class_settings(config), network_name(config)
    adapter, complete = network.adapter, complete_settings(network)
    if num_classes and not adapter.reads_classes:
        raise NetworkError(f"{name} reads text and no classes; set text.classes=false, or choose another network")
    if text_shape is None and adapter.reads_text:
        raise NetworkError(f"{name} needs a text; choose a text encoder, or a network without text")
    if text_shape is not None and not (adapter.reads_text or "pooled_width" in complete):
        raise NetworkError(f"{name} reads classes and no text; choose another network, or set text=none")
    if text_shape is not None and not text_shape[2] and adapter.reads_pooled(complete):
        raise NetworkError(f"{name} needs the pooled vector of a text; choose a text encoder with one")


def check_blocks(class_name: str) -> None:
    """Raise `NetworkError` for a class without blocks whose channels a t can select."""
    if not ADAPTERS[class_name].blocks:
        able = ", ".join(name for name, adapter in ADAPTERS.items() if adapter.blocks)
        raise NetworkError(
            f"expert.task_share selects channels of blocks of one width, and {class_name} has none; choose one of "
            f"{able}, or leave it at 1"
        )


def network_name(config: AnyNetworkConfig) -> str:
    """Return the name of a configured network in messages."""
    return class_settings(config).class_name if config.kind == "diffusers" else config.kind


def complete_settings(network: ClassSettings) -> Settings:
    """Return a network's settings with the class's defaults.

    Raises `SettingsError` for an unknown class or setting, one that follows from the data, or one below zero.
    """
    defaults = default_settings(network.adapter)
    _check_names(network.settings, defaults, f"network.settings of {network.class_name}")
    complete = {**defaults, **network.settings}
    if derived := sorted(network.settings.keys() & _data_names(network.adapter, complete)):
        raise SettingsError(f"{', '.join(derived)} of {network.class_name} follow from the data; leave them out")
    for name, value in network.settings.items():
        if isinstance(value, int | float) and value < 0:
            raise SettingsError(f"network.settings.{name} of {network.class_name} must not be negative; got {value}")
    return complete


def _side_multiple(network: ClassSettings, complete: Settings) -> int:
    try:
        multiple = network.adapter.side_multiple(complete)
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise NetworkError(f"network.settings of {network.class_name} cannot be read: {error}") from error
    if multiple < 1:
        raise NetworkError(f"{network.class_name} needs patches of side 1 or more; got {multiple}")
    return multiple


def _data_names(adapter: Adapter, settings: Settings) -> set[str]:
    return set(adapter.data_settings(settings, DataShape(latent_shape=(1, 1, 1))))


def _check_names(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise `SettingsError` for a name that is not known, with those that are."""
    known = sorted(known)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise SettingsError(f"{what} has no {name}; {hint}known are {', '.join(known)}")


def _check_sides(config: AnyNetworkConfig, multiple: int, sides: tuple[int, ...]) -> None:
    side = next((side for side in sides if side % multiple), None)
    if isinstance(config, UNetConfig):
        _check_unet(config, side)
    elif side is not None:
        raise NetworkError(
            f"{network_name(config)} cuts latents into patches of side {multiple}, which does not divide {side}; "
            "change the patch size to a divisor, choose another codec or data.image_size, or use residual_mlp"
        )


def _check_unet(config: UNetConfig, side: int | None) -> None:
    if side is not None:
        raise NetworkError(
            f"unet halves the side {len(config.channels) - 1} times, and {side} cannot be halved so often; "
            f"give network.channels at most {_count_halvings(side) + 1} entries, or use residual_mlp"
        )
    if config.attention and config.channels[-1] % 8:
        raise NetworkError(
            f"attention needs the lowest level's channels to be a multiple of 8, not {config.channels[-1]}; "
            "change network.channels or set network.attention=false"
        )


def _count_halvings(side: int) -> int:
    """Return how often `side` can be halved."""
    return (side & -side).bit_length() - 1
