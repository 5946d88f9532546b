"""Which latents each kind of network accepts: rules on the configuration alone, without torch."""

import math

from ddm_core.errors import DDMError
from experts.config import CodecConfig, DiTConfig, ResidualMLPConfig, UNetConfig


class NetworkError(DDMError, ValueError):
    """A network does not support these latents."""


class CodecError(DDMError, ValueError):
    """A codec does not fit the images, or its files are not valid."""


def latent_shape_of(config: CodecConfig, image_size: int, channels: int) -> tuple[int, ...]:
    """Return the shape of a sample in the codec's latent space; raise `CodecError` if the codec does not fit images."""
    if config.kind == "pixels":
        return (channels, image_size, image_size)
    if config.kind == "patch_pca":
        return _patch_grid(config, image_size, channels)
    return (config.components,)


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
    if config.kind == "pixels":
        return 0
    return (config.patch_size if config.kind == "patch_pca" else image_size) ** 2 * channels


def check_latent_shape(config: ResidualMLPConfig | UNetConfig | DiTConfig, latent_shape: tuple[int, ...]) -> None:
    """Raise `NetworkError` if a network cannot have such latents."""
    if isinstance(config, ResidualMLPConfig):
        return
    if len(latent_shape) != 3 or latent_shape[1] != latent_shape[2]:
        raise NetworkError(
            f"{config.kind} needs latents of shape (channels, side, side), not {latent_shape}; "
            "choose network residual_mlp, or codec pixels or patch_pca"
        )
    side = latent_shape[1]
    if isinstance(config, UNetConfig):
        _check_unet(config, side)
    elif side % config.patch_size:
        raise NetworkError(
            f"dit cuts latents into patches of side {config.patch_size}, which does not divide {side}; "
            "change network.patch_size to a divisor, or use residual_mlp"
        )


def _check_unet(config: UNetConfig, side: int) -> None:
    lower_levels = len(config.channels) - 1
    if side % 2**lower_levels:
        raise NetworkError(
            f"unet halves the side {lower_levels} times, and {side} cannot be halved so often; "
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
