"""Principal components as latents, with a small convolutional network as decoder."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ddm_core.artifacts import Workspace, read_json, write_json
from experts.architectures.conv_decoder import ConvDecoder, decoder_loss
from experts.codec import ENCODER, PixelCodec, encoder_folder
from experts.codecs.patch_pca import PatchPCACodec, fit_patch_pca_codec, load_patch_pca_codec
from experts.codecs.pca import PCACodec, fit_pca_codec, load_pca_codec
from experts.config import REFINED_SUFFIX, CodecConfig
from experts.networks.model_io import load_model, save_model
from experts.training.flops import forward_flops, training_flops
from experts.training.latent_dataset import Batch
from experts.training.latents.training_set import encode_latents
from experts.training.trainer import fit, write_rows
from experts.types import DecodedImages, Images, Latents

DECODE_BATCH = 256
LinearCodec = PCACodec | PatchPCACodec
FITS: dict[str, Callable[[CodecConfig, Path], LinearCodec]] = {"pca": fit_pca_codec, "patch_pca": fit_patch_pca_codec}
LOADS: dict[str, Callable[[Path, dict[str, Any]], LinearCodec]] = {
    "pca": load_pca_codec,
    "patch_pca": load_patch_pca_codec,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinedCodec:
    """Encodes with its linear codec, decodes with its network: latents, or what the linear codec makes of them."""

    linear: LinearCodec
    decoder: ConvDecoder

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return height, width and channels of an image."""
        return self.linear.image_shape

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Return the shape of a latent of the linear codec."""
        return self.linear.latent_shape

    def encode(self, images: Images) -> Latents:
        """Return the latents of images, float32."""
        return self.linear.encode(images)

    @torch.inference_mode()
    def decode(self, latents: Latents) -> DecodedImages:
        """Return the images of latents, clipped to [0, 1]."""
        decoder = self.decoder
        nn.Module.to(decoder, latents.device)  # diffusers' own imports peft first, for a second
        images = [
            decoder(_decoder_input(self.linear, decoder, rows)) for rows in torch.split(latents.float(), DECODE_BATCH)
        ]
        return PixelCodec(image_shape=self.linear.image_shape).decode(torch.cat(images))

    def with_size(self, height: int, width: int) -> "RefinedCodec":
        """Return the codec for images of this size; raises like the linear codec."""
        return replace(self, linear=self.linear.with_size(height, width))

    def save(self, folder: Path) -> None:
        """Write the linear codec below `encoder/` and the network below `decoder/`."""
        encoder = folder / ENCODER
        encoder.mkdir()
        self.linear.save(encoder)
        metadata = read_json(encoder / "codec.json")
        write_json(folder / "codec.json", metadata | {"kind": metadata["kind"] + REFINED_SUFFIX})
        save_model(self.decoder, folder / "decoder")


def fit_refined_codec(config: CodecConfig, shards: Path, out: Path, workspace: Workspace) -> float:
    """Fit the components, then the network; write the codec to `out`, return the FLOPs."""
    return _train_decoder(config, FITS[config.encoder.kind](config, shards), shards, out, workspace)


def fit_decoder(config: CodecConfig, encoder: Path, shards: Path, out: Path, workspace: Workspace) -> float:
    """Train the decoder of the linear codec that was fitted to `config.encoder` on the same shards.

    Writes the whole codec to `out` and returns the FLOPs of the training; equals `fit_refined_codec` bit for bit.
    """
    metadata = read_json(encoder / "codec.json")
    linear = LOADS[config.encoder.kind](encoder, metadata)
    return _train_decoder(config, linear, shards, out, workspace)


def _train_decoder(config: CodecConfig, linear: LinearCodec, shards: Path, out: Path, workspace: Workspace) -> float:
    """Train the network on noised latents."""
    training = config.decoder_training
    pixels = PixelCodec(image_shape=linear.image_shape)
    pixels.save(workspace.scratch / "pixels")
    images = encode_latents([shards], pixels, workspace.scratch / "pixels", workspace)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        decoder = _build_decoder(config, linear.image_shape)

    def loss(model: nn.Module, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        sized = linear.with_size(*batch.clean.shape[2:])
        latents = sized.encode(pixels.decode(batch.clean).mul(255).round().byte().numpy())
        noised = (latents + config.decoder_noise * torch.randn_like(latents)).to(batch.clean.device)
        return {"loss": decoder_loss(model(_decoder_input(sized, decoder, noised)), batch.clean)}

    trained = fit(decoder, loss, images, training, workspace)
    RefinedCodec(linear=linear, decoder=_check_decoder(trained.model)).save(out)
    write_rows(out / "metrics.jsonl", trained.rows)
    return training_flops(
        forward_flops(probe_decoder(config, linear.image_shape)[1]), training.batch_size, training.steps
    )


def probe_decoder(
    config: CodecConfig, image_shape: tuple[int, int, int], rows: int = 1
) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return a new decoder and its call on one row or several."""
    decoder, (height, width, channels) = _build_decoder(config, image_shape), image_shape
    shape = (decoder.config.components,) if decoder.config.components else (channels, height, width)
    return decoder, partial(decoder, torch.zeros(rows, *shape))


def load_refined_codec(folder: Path, metadata: dict[str, Any]) -> RefinedCodec:
    """Load a folder that `RefinedCodec.save` wrote; `metadata` is its `codec.json`."""
    linear = LOADS[metadata["kind"].removesuffix(REFINED_SUFFIX)](encoder_folder(folder), metadata)
    decoder = _check_decoder(load_model((ConvDecoder,), folder / "decoder"))
    if tuple(decoder.config.image_shape) != linear.image_shape:
        raise ValueError(f"its decoder is of images of shape {decoder.config.image_shape}, not {linear.image_shape}")
    return RefinedCodec(linear=linear, decoder=decoder)


def _check_decoder(model: nn.Module) -> ConvDecoder:
    """Return the model as a decoder for inference; raise `TypeError` for another class."""
    if not isinstance(model, ConvDecoder):
        raise TypeError(f"a decoder must be a ConvDecoder, not a {type(model).__name__}")
    decoder: ConvDecoder = model.eval()
    return decoder


def _build_decoder(config: CodecConfig, image_shape: tuple[int, int, int]) -> ConvDecoder:
    """Build a decoder of components of whole images, since each concerns all pixels, or of images from patches."""
    components = config.components if config.kind == "pca_conv" else 0
    return _check_decoder(ConvDecoder(components, image_shape, config.decoder_width))


def _decoder_input(linear: LinearCodec, decoder: ConvDecoder, latents: Tensor) -> Tensor:
    """Return the latents themselves, or the linear codec's images in [-1, 1], channels first."""
    if decoder.config.components:
        return latents
    return linear.decode(latents).permute(0, 3, 1, 2).mul(2).sub(1).to(latents.device)
