"""Which latents each kind of network accepts: rules on the configuration alone, without torch."""

from ddm_core.errors import DDMError
from experts.config import CodecConfig, DiTConfig, ResidualMLPConfig, UNetConfig


class NetworkError(DDMError, ValueError):
    """A network does not support these latents."""


def latent_shape_of(config: CodecConfig, image_size: int, channels: int) -> tuple[int, ...]:
    """Return the shape of a sample in the codec's latent space."""
    return (channels, image_size, image_size) if config.kind == "pixels" else (config.components,)


def check_latent_shape(config: ResidualMLPConfig | UNetConfig | DiTConfig, latent_shape: tuple[int, ...]) -> None:
    """Raise `NetworkError` if a network cannot have such latents."""
    if isinstance(config, ResidualMLPConfig):
        return
    if len(latent_shape) != 3 or latent_shape[1] != latent_shape[2]:
        raise NetworkError(
            f"{config.kind} needs latents of shape (channels, side, side), not {latent_shape}; "
            "choose network residual_mlp, or codec pixels"
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
