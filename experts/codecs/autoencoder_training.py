"""Train a small autoencoder of diffusers on the images of the shards, and measure the scale of its latents."""

import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import diffusers
import torch
from jaxtyping import Float
from torch import Tensor, nn

from data_partition.shards.shards import read_batches, read_index
from ddm_core.artifacts import Workspace
from experts.architectures.conv_decoder import decoder_loss
from experts.codec import PixelCodec
from experts.codecs.autoencoder import AutoencoderCodec, raw_latents
from experts.config import CodecConfig
from experts.training.flops import forward_flops, training_flops
from experts.training.latent_dataset import Batch
from experts.training.latents.training_set import encode_latents
from experts.training.trainer import fit, write_rows

SCALE_BATCH, SCALE_BATCHES = 256, 16
"""Images a batch, and batches, from which the scale of the latents is measured."""


def fit_autoencoder(config: CodecConfig, shards: Path, out: Path, workspace: Workspace) -> float:
    """Train the autoencoder, write it to `out` with the scale of its latents, and return the FLOPs."""
    training, image_shape = config.decoder_training, read_index(shards).image_shape
    pixels = PixelCodec(image_shape=image_shape)
    pixels.save(workspace.scratch / "pixels")
    images = encode_latents([shards], pixels, workspace.scratch / "pixels", workspace)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        model = build_autoencoder(config, image_shape[2])

    def loss(model: Any, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        return autoencoder_loss(model, batch.clean, config)

    trained = fit(model, loss, images, training, workspace)
    codec = AutoencoderCodec(image_shape=image_shape, model=trained.model)
    set_scale(codec, shards)
    codec.save(out)
    write_rows(out / "metrics.jsonl", trained.rows)
    with torch.device("meta"):
        _, call = probe_autoencoder(config, image_shape)
    return training_flops(forward_flops(call), training.batch_size, training.steps)


def build_autoencoder(config: CodecConfig, channels: int) -> nn.Module:
    """Return an autoencoder with parameters from torch's global generator; each level halves the sides."""
    levels = int(math.log2(config.patch_size)) + 1
    model: nn.Module = BUILDERS[config.kind](config, channels, levels)
    return model


def _build_tiny(config: CodecConfig, channels: int, levels: int) -> nn.Module:
    widths, blocks = (config.decoder_width,) * levels, (1,) * levels
    model: nn.Module = diffusers.AutoencoderTiny(
        in_channels=channels,
        out_channels=channels,
        latent_channels=config.latent_channels,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
    )
    return model


def _build_kl(config: CodecConfig, channels: int, levels: int) -> nn.Module:
    model: nn.Module = diffusers.AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        latent_channels=config.latent_channels,
        block_out_channels=_widths(config, levels),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=math.gcd(32, config.decoder_width),
    )
    return model


def _build_dc(config: CodecConfig, channels: int, levels: int) -> nn.Module:
    widths, layers, scales = _widths(config, levels), (1,) * levels, ((),) * levels
    can_average = widths[-1] % config.latent_channels == 0
    model: nn.Module = diffusers.AutoencoderDC(
        in_channels=channels,
        latent_channels=config.latent_channels,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        encoder_out_shortcut=can_average,
        decoder_in_shortcut=can_average,
    )
    return model


def _widths(config: CodecConfig, levels: int) -> tuple[int, ...]:
    return tuple(config.decoder_width * min(2**level, 4) for level in range(levels))


BUILDERS: dict[str, Callable[[CodecConfig, int, int], nn.Module]] = {
    "autoencoder_tiny": _build_tiny,
    "autoencoder_kl": _build_kl,
    "autoencoder_dc": _build_dc,
}


def autoencoder_loss(
    model: Any, images: Float[Tensor, "batch channel height width"], config: CodecConfig
) -> dict[str, Float[Tensor, ""]]:
    """Return the error of decoded images and, of a distribution, its divergence from the unit Gaussian.

    Latents without a distribution get noise of `codec.decoder_noise` times their root mean square.
    """
    code = model.encode(images, return_dict=False)[0]
    if isinstance(code, Tensor):
        rms = code.detach().square().mean().sqrt()
        latents, divergence = code + config.decoder_noise * rms * torch.randn_like(code), code.new_zeros(())
    else:
        latents, divergence = code.mean + code.std * torch.randn_like(code.mean), code.kl().mean() / images[0].numel()
    error = decoder_loss(model.decode(latents, return_dict=False)[0], images)
    return {"loss": error + config.kl_weight * divergence, "error": error, "divergence": divergence}


@torch.no_grad()
def set_scale(codec: AutoencoderCodec, shards: Path) -> None:
    """Store the shift and scale that give latents of training images unit scale, as far as the class has them."""
    model: Any = codec.model
    pixels, batches = (
        PixelCodec(image_shape=codec.image_shape),
        islice(read_batches(shards, SCALE_BATCH), SCALE_BATCHES),
    )
    latents = torch.cat([raw_latents(model, pixels.encode(batch.images)) for batch in batches])
    shift = latents.mean() if "shift_factor" in model.config else torch.zeros(())
    settings = {"scaling_factor": 1 / (latents - shift).square().mean().sqrt().item()}
    if "shift_factor" in model.config:
        settings["shift_factor"] = shift.item()
    model.register_to_config(**settings)


def probe_autoencoder(
    config: CodecConfig, image_shape: tuple[int, int, int], rows: int = 1
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return a new autoencoder and its call on one image or several, which encodes and decodes."""
    height, width, channels = image_shape
    model: Any = build_autoencoder(config, channels)
    image = torch.zeros(rows, channels, height, width)
    return model, lambda: model.decode(raw_latents(model, image), return_dict=False)[0]
